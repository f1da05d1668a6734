"""Prepares texts and labels for a pipeline: templates of tasks, token ids, and the limit of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..hf.architecture import context_length, is_causal, is_encoder_decoder
from ..tasks.encoding import encode_text, token_ids, without_end
from ..tasks.task import Task
from .prompt_bank import PromptBank

Text = str | Mapping[str, Any]
"""A string, or a mapping with the columns that a template names."""
Prompts = str | None | Sequence[str | None]
"""One prompt for all texts, or one for each; None: no prompt."""
Labels = Mapping[str, str] | Sequence[str] | None
"""What the model may say for each label, or the words alone; None: as each prompt's task says."""
Encoded = dict[tuple[str, int, bool] | None, list[int]]
"""A text's token ids by a task's template, length limit and special tokens; None: without a task."""


class TextEncoder:
    """Token ids of texts, rendered as the task of each text's prompt says."""

    def __init__(self, bank: PromptBank, tokenizer: Any) -> None:
        base = bank.model.base_model
        self.bank, self.tokenizer = bank, tokenizer
        self.context_length = context_length(base)
        self._causal, self._encoder_decoder = is_causal(base), is_encoder_decoder(base)

    def ids(self, text: Text, name: str | None, encoded: Encoded | None = None) -> list[int]:
        """Token ids of a text for the prompt `name`.

        Args:
            encoded: what is known of this text already; added to.

        Raises:
            ValueError: an empty text, or one that does not fit into the model's context.
        """
        task = self._task(name)
        key = None if task is None else (task.template, task.max_length, task.special_tokens)
        encoded = {} if encoded is None else encoded
        if key not in encoded:
            encoded[key] = self.encode(text, task, name)
        self.check_length(len(encoded[key]), name)
        return encoded[key]

    def encode(self, text: Text, task: Task | None, name: str | None) -> list[int]:
        """Token ids of a text, rendered with the template of a task, if there is one."""
        if isinstance(text, str) and not text.strip():
            raise ValueError("the text is empty")
        if task is not None and (not isinstance(text, str) or len(task.columns) == 1):
            row = {task.columns[0]: text} if isinstance(text, str) else text
            ids = encode_text(task, row, self.tokenizer, encoder_decoder=self._encoder_decoder)
        elif isinstance(text, str):
            ids = list(self.tokenizer(text).input_ids)
            if self._causal:
                ids = without_end(ids, self.tokenizer)
        else:
            raise ValueError(f"a text must be a string, because prompt {name!r} has no task with a template")
        if not ids:
            raise ValueError("the text has no tokens")
        return ids

    def check_length(self, tokens: int, name: str | None, more: str = "") -> None:
        """Refuses a text that is too long together with its prompt; `more` describes tokens to come."""
        virtual = 0 if name is None else len(self.bank[name])
        if self.context_length is not None and tokens + virtual > self.context_length:
            raise ValueError(
                f"a text must fit into the model's context of {self.context_length} tokens, got {tokens} tokens"
                f"{more} after a prompt of {virtual}"
            )

    def target(self, text: str) -> list[int]:
        """Token ids of a continuation."""
        target = token_ids(self.tokenizer, text)
        if not target:
            raise ValueError("the continuation has no tokens")
        return target

    def label_words(self, labels: Labels, name: str | None) -> dict[str, list[int]]:
        """Token ids of what the model says for each label."""
        if labels is None:
            task = self._task(name)
            if task is None or task.kind != "classification":
                raise ValueError(f"`labels` must be given, because prompt {name!r} has no classification task")
            labels = task.label_words
        words = dict(labels) if isinstance(labels, Mapping) else {word.strip(): word for word in labels}
        ids = {label: token_ids(self.tokenizer, word) for label, word in words.items()}
        if len(ids) < 2 or not all(ids.values()):
            raise ValueError(f"`labels` must be at least two words with tokens, got {words}")
        return ids

    def _task(self, name: str | None) -> Task | None:
        return None if name is None else self.bank.task(name)


def prompt_of_each(prompts: Prompts, texts: Sequence[Text]) -> list[str | None]:
    """The prompt's name for each text."""
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts, got one string")
    if prompts is None or isinstance(prompts, str):
        return [prompts] * len(texts)
    if len(prompts) != len(texts):
        raise ValueError(f"`prompts` must name one for each of the {len(texts)} texts, got {len(prompts)}")
    return list(prompts)
