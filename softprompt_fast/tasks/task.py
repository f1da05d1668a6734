"""A task: how a row of data becomes text, and what the model should answer."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .words import spaced

TASK_FILE = "task.json"
KINDS = ("classification", "generation")


@dataclass
class Task:
    """A task, saved with its prompt so that ``predict`` and ``evaluate`` need nothing else.

    Classification: the row's text is rendered with ``template`` and each label is a word (or several) that the model
    may say next; the likeliest wins. Generation: the model continues the rendered text with the response.
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

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.columns:
            raise ValueError(f"`template` must name at least one column in braces, got {self.template!r}")
        if self.kind == "classification" and len(set(self.label_words.values())) < 2:
            raise ValueError(f"`label_words` must give at least two different words, got {self.label_words}")
        empty = [label for label, word in self.label_words.items() if not word]
        if empty:
            raise ValueError(f"`label_words` must give a word for each label, got none for {empty}")
        if self.encoding not in (1, 2):
            raise ValueError(f"`encoding` must be 1 or 2, got {self.encoding}; a newer version tuned this prompt")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be positive, got {self.max_length}")

    @property
    def columns(self) -> list[str]:
        """The columns that the template names."""
        try:
            return [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        except ValueError as error:
            raise ValueError(f"`template` must be a format string, got {self.template!r}: {error}") from error

    @property
    def labels(self) -> list[str]:
        return list(self.label_words)

    def text(self, row: Mapping[str, Any]) -> str:
        """The text that the model reads for a row."""
        try:
            return self.template.format_map({name: row[name] for name in self.columns})
        except KeyError as error:
            raise ValueError(f"the template names column {error}, but the data has {list(row)}") from error

    def target(self, row: Mapping[str, Any]) -> str:
        """The text that the model should say for a row."""
        if self.target_column not in row:
            raise ValueError(f"no column {self.target_column!r} in the data, which has {list(row)}")
        value = row[self.target_column]
        if self.kind == "generation":
            return str(value)
        if str(value) not in self.label_words:
            raise ValueError(f"label {value!r} is not among the task's labels {self.labels}")
        return self.label_words[str(value)]

    def save(self, folder: PathLike[str] | str) -> None:
        (Path(folder) / TASK_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: PathLike[str] | str) -> Task:
        """The task saved in a prompt's folder, or in the only prompt folder below it."""
        folder = Path(folder)
        files = [folder / TASK_FILE] if (folder / TASK_FILE).is_file() else sorted(folder.glob(f"*/{TASK_FILE}"))
        if len(files) != 1:
            raise FileNotFoundError(f"{folder} must hold one prompt with a {TASK_FILE}, got {len(files)}")
        return cls(**{"encoding": 1} | json.loads(files[0].read_text()))


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
    template = template or f"{{{text_column}}}\n{label_column.capitalize()}:"
    if label_words is None:
        if rows and label_column not in rows[0]:
            raise ValueError(f"no column {label_column!r} in the data, which has {list(rows[0])}")
        labels = sorted({str(row[label_column]) for row in rows if row.get(label_column) is not None})
        if len(labels) > 100:
            raise ValueError(f"column {label_column!r} holds {len(labels)} different values; is it a label?")
        label_words = {label: spaced(label.strip(), template) for label in labels}
    return Task("classification", template, label_column, dict(label_words), **fields)


def generation_task(
    *, input_column: str = "prompt", output_column: str = "response", template: str | None = None, **fields: Any
) -> Task:
    """A task in which the model continues the input column's text with the output column's."""
    return Task("generation", template or f"{{{input_column}}}", output_column, **fields)
