"""A task: how a row of data becomes text, and what the model should answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..base.locations import located
from . import chat, templates
from .containers import as_rows
from .head import Head
from .head_values import answers_of, words_of
from .rows import place
from .values import is_blank, is_missing, label_name, label_names, matching_label, messages_of, text_of
from .words import spaced

TASK_FILE = "task.json"
KINDS = ("classification", "generation", "tagging", "answering")
"""The last two need a head. A classification is answered by label words, or by a head."""


@dataclass
class Task:
    """A task, saved with its prompt so that ``predict`` and ``evaluate`` need nothing else.

    Classification: the row's text is rendered with ``template`` and each label is a word (or several) that the model
    may say next; the likeliest wins. Generation: the model continues the rendered text with the response.

    With a ``head``, the model's head answers: with a label, with a tag for each word (tagging), or with a part of the
    context (answering).
    """

    kind: str
    template: str
    """The text, with columns in braces: ``"{text}\\nSentiment:"``."""
    target_column: str
    """Column of the label or of the response."""
    label_words: dict[str, str] = field(default_factory=dict)
    """Classification: the words that the model says for each label, leading space included."""
    max_length: int = 512
    """Longest text in tokens, prompt not counted; longer texts lose their beginning."""
    model: str | None = None
    """Folder or name of the base model."""
    prompt: str = "prompt"
    """Name of the prompt."""
    special_tokens: bool = True
    """Whether the tokenizer puts its special tokens (BOS) around a text; False for prompts that hold BOS themselves."""
    encoding: int = 2
    """Rules by which rows become tokens. 2: answers as in running text, label words with an end token where one begins
    another, long texts without the beginning of their columns. 1: the rules of prompts saved without this field."""
    literal: bool = False
    """Without ``special_tokens``: whether those that the template writes stay, wherever they are; for chats and for
    compressed texts. Else BOS at the beginning and an end token at the end are left out."""
    chat: dict[str, str] | None = None
    """Generation from conversations: the tokenizer's ``chat_template``, and the special tokens that it names.
    An empty mapping until :meth:`read_chat`. None: no conversations."""
    head: Head | None = None
    """The head that answers. None: the language-modelling head."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.head is None and self.kind in ("tagging", "answering"):
            raise ValueError(f"`head` must be given with kind={self.kind!r}")
        if self.head is not None:
            if self.kind != self.head.kind:
                raise ValueError(f"`kind` must be {self.head.kind!r} for the head {self.head.name}, got {self.kind!r}")
            if self.label_words:
                raise ValueError(f"`label_words` cannot be combined with a head, got {self.label_words}")
        if not self.columns:
            raise ValueError(f"`template` must name at least one column in braces, got {self.template!r}")
        if self.target_column in self.columns and not (self.kind == "generation" and self.chat is not None):
            raise ValueError(f"`template` must not name the column of the answer, got {self.target_column!r}")
        if self.kind == "classification" and self.head is None and len(set(self.label_words.values())) < 2:
            raise ValueError(f"`label_words` must give at least two different words, got {self.label_words}")
        empty = [label for label, word in self.label_words.items() if not word]
        if empty:
            raise ValueError(f"`label_words` must give a word for each label, got none for {empty}")
        if self.encoding not in (1, 2):
            raise ValueError(f"`encoding` must be 1 or 2, got {self.encoding}; a newer version tuned this prompt")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be positive, got {self.max_length}")

    @property
    def prompt_holds_bos(self) -> bool:
        """Whether texts are read without the BOS token because the prompt begins with it."""
        return not self.special_tokens and not self.literal

    @property
    def columns(self) -> list[str]:
        """The columns that the template names."""
        return templates.columns(self.template)

    @property
    def labels(self) -> list[str]:
        return list(self.label_words) if self.head is None else list(self.head.labels)

    def text(self, row: Mapping[str, Any]) -> str:
        """The text that the model reads for a row. A missing value is an empty text.

        Raises:
            ValueError: no such column, no text in any column, or a value that is no text.
        """
        values = {}
        for name in self.columns:
            if name not in row:
                raise ValueError(
                    f"the template names column {name!r}, but the data has {list(row)}; "
                    "a column is named as it is called, and braces around other text are doubled: {{ and }}"
                )
            values[name] = self.cell(row[name], name)
        if all(is_blank(value) for value in values.values()):
            raise ValueError("the text is empty")
        return templates.render(self.template, values)

    def label(self, row: Mapping[str, Any]) -> str:
        """The label of a row, by the name that the task has for it.

        Raises:
            ValueError: no label, more than one, or one that the task does not know.
        """
        name = label_name(self._target_value(row), self.target_column)
        label = matching_label(name, self.labels)
        if label is None:
            raise ValueError(f"label {name!r} is not among the task's labels {self.labels}")
        return label

    def target(self, row: Mapping[str, Any]) -> str:
        """The text that the model should say for a row.

        Raises:
            ValueError: no label or response, or one that is no text or no label of the task.
        """
        if self.kind == "classification":
            return self.label_words[self.label(row)]
        value = self._target_value(row)
        messages = messages_of(value) if self.chat is not None else None
        return text_of(value, self.target_column) if messages is None else chat.answer(messages, self.target_column)

    def words(self, row: Mapping[str, Any]) -> list[str]:
        """Tagging: the words of a row.

        Raises:
            ValueError: no such column, no words, or a value that is no list of texts.
        """
        (column,) = self.columns
        if column not in row:
            raise ValueError(f"no column {column!r} in the data, which has {list(row)}")
        words = words_of(row[column], column)
        if not words:
            raise ValueError("the text is empty")
        return words

    def tags(self, row: Mapping[str, Any]) -> list[str]:
        """Tagging: the tag of each word of a row, by the names that the task has for them.

        Raises:
            ValueError: no tags, not one for each word, or one that the task does not know.
        """
        column = self.target_column
        names = words_of(self._target_value(row), column)
        words = self.words(row)
        if len(names) != len(words):
            raise ValueError(f"column {column!r} must hold one tag for each of {len(words)} words, got {len(names)}")
        tags = [matching_label(name, self.labels) for name in names]
        if None in tags:
            unknown = names[tags.index(None)]
            raise ValueError(f"tag {unknown!r} is not among the task's labels {self.labels}")
        return [tag for tag in tags if tag is not None]

    def answers(self, row: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Answering: the right answers of a row, each with the place of its first character in the context.

        Raises:
            ValueError: no answer, or one that is not in the context.
        """
        column = self.columns[-1]
        if column not in row:
            raise ValueError(f"no column {column!r} in the data, which has {list(row)}")
        return answers_of(self._target_value(row), self.cell(row[column], column), self.target_column)

    def _target_value(self, row: Mapping[str, Any]) -> Any:
        if self.target_column not in row:
            raise ValueError(f"no column {self.target_column!r} in the data, which has {list(row)}")
        if is_missing(row[self.target_column]):
            raise ValueError(f"the row has no {self.target_column!r}")
        return row[self.target_column]

    def cell(self, value: Any, column: str) -> str:
        """The text of a column's value; a conversation is written as the model's chat template says.

        Raises:
            ValueError: a value that is no text, naming the column and the value.
        """
        if self.kind == "tagging":
            return " ".join(words_of(value, column))
        messages = messages_of(value)
        if messages is None:
            return text_of(value, column)
        if self.chat is None:
            raise ValueError(
                f"column {column!r} must hold text, got a conversation; conversations are read in generation tasks "
                "of a model with a chat template (--chat-column)"
            )
        return chat.question(messages, self.chat)

    def read_chat(self, tokenizer: Any) -> None:
        """Takes the chat template of a tokenizer, if the task reads conversations and has none yet.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if self.chat == {}:
            self.chat = chat.chat_of(tokenizer)

    def to_json(self) -> dict[str, Any]:
        """The fields; as in files of older versions, those of a head and of literal templates only where they count."""
        fields = asdict(self)
        return {key: value for key, value in fields.items() if key not in ("head", "literal") or value}

    def save(self, folder: PathLike[str] | str) -> None:
        (Path(folder) / TASK_FILE).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: PathLike[str] | str) -> Task:
        """The task saved in a prompt's folder or a version of it, or in the only prompt folder below."""
        folder = located(folder)
        files = [folder / TASK_FILE] if (folder / TASK_FILE).is_file() else sorted(folder.glob(f"*/{TASK_FILE}"))
        if len(files) != 1:
            raise FileNotFoundError(f"{folder} must hold one prompt with a {TASK_FILE}, got {len(files)}")
        try:
            fields = {"encoding": 1} | json.loads(files[0].read_text())
            if fields.get("head") is not None:
                fields["head"] = Head(**fields["head"])
            return cls(**fields)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{files[0]} must hold the fields of a task: {error}") from error


def classification_task(
    rows: Sequence[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str = "label",
    template: str | None = None,
    label_words: Mapping[str, str] | None = None,
    **fields: Any,
) -> Task:
    """A classification task with the labels that the rows hold; by default a label's word is its own name.

    Args:
        template: None: the text, a line break and the label column's name with a colon.
    """
    rows = as_rows(rows)
    name = label_column.capitalize().replace("{", "{{").replace("}", "}}")
    template = f"{templates.field(text_column)}\n{name}:" if template is None else template
    if label_words is None:
        label_words = {label: spaced(label.strip(), template) for label in labels_in(rows, label_column)}
    return Task("classification", template, label_column, dict(label_words), **fields)


def labels_in(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The different labels of the rows, sorted.

    Raises:
        ValueError: no such column, or more than 100 labels.
    """
    if rows and column not in rows[0]:
        raise ValueError(f"no column {column!r} in the data, which has {list(rows[0])}")
    labels = label_names(names_in(rows, column))
    if len(labels) > 100:
        raise ValueError(f"column {column!r} holds {len(labels)} different values; is it a label?")
    return labels


def names_in(rows: Sequence[Mapping[str, Any]], column: str) -> set[str]:
    """The label of each row that has one.

    Raises:
        ValueError: a list or another value that is not one label, with its row.
    """
    names = set()
    for i, row in enumerate(rows):
        if not is_missing(row.get(column)):
            try:
                names.add(label_name(row[column], column))
            except ValueError as error:
                if not isinstance(row[column], str):  # text that is no valid Unicode costs its row only
                    raise ValueError(f"{place(rows, i)}: {error}") from error
    return names


def generation_task(
    *, input_column: str = "prompt", output_column: str = "response", template: str | None = None, **fields: Any
) -> Task:
    """A task in which the model continues the input column's text with the output column's."""
    template = templates.field(input_column) if template is None else template
    return Task("generation", template, output_column, **fields)
