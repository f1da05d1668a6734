"""How logits are computed: by this library, by a plain transformers model, by PEFT's prompt tuning."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.collation import Collator, pad_token_id

Ids = Sequence[Sequence[int]]
FRONT = "front"


class Backend(Protocol):
    """Logits behind texts given as token ids, one row each."""

    def next_logits(self, texts: Ids) -> Tensor:
        """[B, V], what may follow each text."""

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        """[M, V] for M target tokens, row by row: what may follow what stands before each of them."""


class Packed:
    """A :class:`SoftPromptModel`: what rows share runs once per batch, padding never.

    Args:
        prompt: of all rows; None: none.
        front: tokens that texts begin with; where they do, their vectors stand in for them as a prompt, which gives
            the same numbers and runs once. Not with ``prompt``.
    """

    def __init__(
        self, model: SoftPromptModel, tokenizer: Any, prompt: str | None = None, front: Sequence[int] = ()
    ) -> None:
        self.model, self.prompt, self.front = model, prompt, list(front)
        self.collate = Collator(pad_token_id(tokenizer))
        if self.front:
            ids = torch.tensor(self.front, device=model.device)
            with torch.no_grad():
                model.add_prompt(FRONT, init=model.get_input_embeddings()(ids))

    def next_logits(self, texts: Ids) -> Tensor:
        rest, prompts = self._split(texts)
        batch = self._batch(rest)
        return self.model.next_token_logits(batch["input_ids"], batch["attention_mask"], prompts)

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        rest, prompts = self._split(texts)
        batch = self._batch(joined(rest, targets))
        at = torch.tensor(places(rest, targets), device=self.model.device)
        return self.model.logits_at(batch["input_ids"], batch["attention_mask"], prompts, at)

    def _split(self, texts: Ids) -> tuple[Ids, str | list[str | None] | None]:
        """Texts without what the prompt stands for, and the prompt of each."""
        count = len(self.front)
        if not count:
            return texts, self.prompt
        begins = [len(text) > count and list(text[:count]) == self.front for text in texts]
        rest = [text[count:] if yes else text for text, yes in zip(texts, begins, strict=True)]
        return rest, [FRONT if yes else None for yes in begins]

    def _batch(self, texts: Ids) -> dict[str, Tensor]:
        return tensors(self.collate([{"input_ids": list(text)} for text in texts]), self.model.device)


class Plain:
    """A transformers decoder, with or without LoRA, run on padded batches; logits only where they are read.

    Args:
        autocast: dtype of the matrix products, for weights kept in float32; None: the weights' own.
    """

    def __init__(self, model: Any, tokenizer: Any, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast
        self.pad = pad_token_id(tokenizer)
        self.collate = Collator(self.pad)
        self.device = model.get_input_embeddings().weight.device
        own = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = set(inspect.signature(own.forward).parameters)

    def next_logits(self, texts: Ids) -> Tensor:
        inputs = self.left_padded(texts)
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        return self._run(inputs)[:, -1]

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        if all(len(target) == 1 for target in targets):
            return self.next_logits(texts)
        inputs: dict[str, Any] = {}
        inputs |= tensors(self.collate([{"input_ids": row} for row in joined(texts, targets)]), self.device)
        at = torch.tensor(places(texts, targets), device=self.device)
        first = 0
        if "logits_to_keep" in self._accepts:
            first = int(at[:, 1].min())
            inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
        return self._run(inputs)[at[:, 0], at[:, 1] - first]

    def left_padded(self, texts: Ids) -> dict[str, Any]:
        """Inputs of a forward call in which every text ends at the last place."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*[self.pad] * (longest - len(t)), *t] for t in texts], device=self.device)
        mask = torch.tensor([[*[0] * (longest - len(t)), *[1] * len(t)] for t in texts], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return inputs

    def cast(self) -> Any:
        """The context in which this model runs."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _run(self, inputs: dict[str, Any]) -> Tensor:
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        with self.cast():
            logits: Tensor = self.model(**inputs).logits
        return logits


class PeftPrompt:
    """PEFT's PromptTuning by its own forward call: every row carries the prompt, padding and all logits are computed.

    With targets it is given labels, as in training; padding stands on the right, where it changes no row's numbers.
    """

    def __init__(self, model: Any, tokenizer: Any, virtual_tokens: int) -> None:
        self.model, self.virtual_tokens = model, virtual_tokens
        self.collate = Collator(pad_token_id(tokenizer))
        self.device = model.get_base_model().get_input_embeddings().weight.device

    def next_logits(self, texts: Ids) -> Tensor:
        batch = tensors(self.collate([{"input_ids": list(text)} for text in texts]), self.device)
        ends = torch.tensor([len(text) for text in texts], device=self.device)
        logits: Tensor = self.model(**batch).logits
        return logits[torch.arange(len(texts), device=self.device), self.virtual_tokens + ends - 1]

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        features = [
            {"input_ids": [*text, *target], "labels": [*[-100] * len(text), *target]}
            for text, target in zip(texts, targets, strict=True)
        ]
        batch = tensors(self.collate(features), self.device)
        at = torch.tensor(places(texts, targets), device=self.device)
        logits: Tensor = self.model(**batch).logits
        return logits[at[:, 0], self.virtual_tokens + at[:, 1]]


def joined(texts: Ids, targets: Ids) -> list[list[int]]:
    return [[*text, *target] for text, target in zip(texts, targets, strict=True)]


def places(texts: Ids, targets: Ids) -> list[list[int]]:
    """[M, 2], row and column of the token before each target token."""
    pairs = enumerate(zip(texts, targets, strict=True))
    return [[row, len(text) + step - 1] for row, (text, target) in pairs for step in range(len(target))]


def tensors(batch: dict[str, Any], device: Any) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
