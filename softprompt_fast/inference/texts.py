"""Prepares texts and labels for a pipeline: templates of tasks, token ids, and the limit of the context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..hf.architecture import context_length, is_causal, is_encoder_decoder
from ..tasks.containers import listed
from ..tasks.encoding import (
    answer_ids,
    checked,
    continuation_ids,
    encode_text,
    label_words,
    moved_space,
    plain_text_ids,
    token_ids,
    with_ends,
    word_ids,
)
from ..tasks.examples import is_empty
from ..tasks.task import Task
from ..tasks.values import is_blank
from .prompt_bank import PromptBank

Text = str | Mapping[str, Any]
"""A string, or a mapping with the columns that a template names."""
Texts = Iterable[Text]
"""Texts in any container: a list, a generator, a numpy array, a pandas or datasets column by position, or a table,
whose rows are mappings."""
Prompts = str | None | Iterable[str | None]
"""One prompt for all texts, or one for each in any container; None: no prompt."""
Labels = Mapping[str, str] | Iterable[str] | None
"""What the model may say for each label, or the words alone; None: as each prompt's task says."""
Encoded = dict[tuple[Any, ...] | None, list[int]]
"""A text's token ids by what a task says of its encoding; None: without a task."""


class TextEncoder:
    """Token ids of texts, rendered as the task of each text's prompt says."""

    def __init__(self, bank: PromptBank, tokenizer: Any) -> None:
        base = bank.model.base_model
        self.bank, self.tokenizer = bank, tokenizer
        self.context_length = context_length(base)
        self._causal, self._encoder_decoder = is_causal(base), is_encoder_decoder(base)
        self._words: dict[tuple[Any, ...], dict[str, list[int]]] = {}

    def ids(self, text: Text, name: str | None, encoded: Encoded | None = None) -> list[int]:
        """Token ids of a text for the prompt `name`.

        Args:
            encoded: what is known of this text already; added to.

        Raises:
            ValueError: an empty text, or one that does not fit into the model's context.
        """
        task = self._task(name)
        key = (
            None if task is None else (task.template, task.max_length, task.special_tokens, task.literal, task.encoding)
        )
        encoded = {} if encoded is None else encoded
        if key not in encoded:
            encoded[key] = self.encode(text, task, name)
        self.check_length(len(encoded[key]), name)
        return encoded[key]

    def encode(self, text: Text, task: Task | None, name: str | None) -> list[int]:
        """Token ids of a text, rendered with the template of a task, if there is one."""
        row = self._row(text, task, name)
        if task is not None:
            ids = encode_text(task, row, self.tokenizer, encoder_decoder=self._encoder_decoder)
        else:
            ids = plain_text_ids(self.tokenizer, row["text"], end=not self._causal)
        if not ids:
            raise ValueError("the text has no tokens")
        return ids

    def _row(self, text: Text, task: Task | None, name: str | None) -> Mapping[str, Any]:
        """The columns of a text; without a task its string as ``text``.

        Raises:
            ValueError: no text, or another value than a string or a mapping with the template's columns.
        """
        if is_missing(text) or (isinstance(text, str) and is_blank(text)):
            raise ValueError("the text is empty")
        if not isinstance(text, (str, Mapping)):
            raise ValueError(f"a text must be a string or a mapping of columns, got {type(text).__name__}")
        if task is None:
            if not isinstance(text, str):
                raise ValueError(f"a text must be a string, because prompt {name!r} has no task with a template")
            return {"text": text}
        columns = list(dict.fromkeys(task.columns))
        if isinstance(text, str):
            if len(columns) > 1:
                raise ValueError(f"a text must be a mapping with the columns {', '.join(columns)}, got a string")
            return {columns[0]: text}
        row = {key: None if is_missing(value) else value for key, value in text.items()}
        if is_empty(task, row):
            raise ValueError("the text is empty")
        return row

    def check_length(self, tokens: int, name: str | None, more: str = "") -> None:
        """Refuses a text that is too long together with its prompt; `more` describes tokens to come."""
        virtual = 0 if name is None else len(self.bank[name])
        if self.context_length is not None and tokens + virtual > self.context_length:
            raise ValueError(
                f"a text must fit into the model's context of {self.context_length} tokens, got {tokens} tokens"
                f"{more} after a prompt of {virtual}"
            )

    def target(self, text: Text, name: str | None, continuation: str) -> list[int]:
        """Token ids of a continuation after a text."""
        if not isinstance(continuation, str):
            raise ValueError(f"a continuation must be a string, got {type(continuation).__name__}")
        task = self._task(name)
        row = self._row(text, task, name)
        if task is not None:
            target = answer_ids(task, row, continuation, self.tokenizer, encoder_decoder=self._encoder_decoder)
        elif self._encoder_decoder:
            target = token_ids(self.tokenizer, checked(continuation))
        else:
            target = continuation_ids(self.tokenizer, checked(continuation), [checked(row["text"])])
        if not target:
            raise ValueError("the continuation has no tokens")
        return target

    def answer_space(self, name: str | None) -> str:
        """The space that belongs to the template of a prompt's task, but is generated with the answer."""
        task = self._task(name)
        return " " if task is not None and not self._encoder_decoder and moved_space(task) else ""

    def label_words(self, labels: Labels, text: Text, name: str | None) -> dict[str, list[int]]:
        """Token ids of what the model says for each label after a text, with end tokens where words need them."""
        task = self._task(name)
        if labels is None:
            if task is None or task.kind != "classification":
                raise ValueError(f"`labels` must be given, because prompt {name!r} has no classification task")
            key = (task.template, tuple(task.label_words.items()), task.encoding)
            if key not in self._words:
                words = label_words(task, self.tokenizer, encoder_decoder=self._encoder_decoder)
                self._words[key] = dict(zip(task.labels, words, strict=True))
            ids = self._words[key]
            said: Mapping[str, str] = task.label_words
        else:
            said = labels if isinstance(labels, Mapping) else {str(word).strip(): str(word) for word in labels}
            if task is not None:
                each = [
                    word_ids(task, self.tokenizer, word, encoder_decoder=self._encoder_decoder)
                    for word in said.values()
                ]
            elif self._encoder_decoder:
                each = [token_ids(self.tokenizer, word) for word in said.values()]
            else:
                before = [checked(self._row(text, None, name)["text"])]
                each = [continuation_ids(self.tokenizer, word, before) for word in said.values()]
            ids = dict(zip(said, with_ends(each, self.tokenizer) if all(each) else each, strict=True))
        if len({tuple(word) for word in ids.values()}) < 2 or not all(ids.values()):
            raise ValueError(f"`labels` must be at least two words with different tokens, got {dict(said)}")
        return ids

    def _task(self, name: str | None) -> Task | None:
        return None if name is None else self.bank.task(name)


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, pandas.NaT or pandas.NA."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def prompt_of_each(prompts: Prompts, texts: list[Any]) -> list[str | None]:
    """The prompt's name for each text; a missing name is no prompt."""
    if prompts is None or isinstance(prompts, str):
        return [prompts] * len(texts)
    names = listed(prompts, "prompts", "names")
    if len(names) != len(texts):
        raise ValueError(f"`prompts` must name one for each of the {len(texts)} texts, got {len(names)}")
    return [None if is_missing(name) else name for name in names]
