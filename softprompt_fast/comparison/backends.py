"""How logits are computed: by this library, by a plain transformers model, by PEFT's prompt tuning."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.likelihood import Ids, ModelBackend, target_places
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.collation import Collator, pad_token_id, padded
from ..tasks.encoding import IGNORED

FRONT = "front"


class Packed:
    """A :class:`SoftPromptModel`: text that rows share runs once per batch, and padding never runs.

    Args:
        prompt: prompt of all rows; None: none.
        front: tokens that texts begin with. Their vectors replace them as a prompt, which gives the same numbers and
            runs once. Cannot be combined with ``prompt``.
    """

    def __init__(self, model: SoftPromptModel, prompt: str | None = None, front: Sequence[int] = ()) -> None:
        self.model, self.prompt, self.front = model, prompt, list(front)
        if self.front:
            ids = torch.tensor(self.front, device=model.device)
            with torch.no_grad():
                model.add_prompt(FRONT, init=model.get_input_embeddings()(ids))

    def next_logits(self, texts: Ids) -> Tensor:
        rest, prompts = self._split(texts)
        return ModelBackend(self.model, prompts).next_logits(rest)

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        rest, prompts = self._split(texts)
        return ModelBackend(self.model, prompts).target_logits(rest, targets)

    def _split(self, texts: Ids) -> tuple[Ids, str | list[str | None] | None]:
        """Texts without the tokens that the prompt replaces, and the prompt of each."""
        count = len(self.front)
        if not count:
            return texts, self.prompt
        begins = [len(text) > count and list(text[:count]) == self.front for text in texts]
        rest = [text[count:] if yes else text for text, yes in zip(texts, begins, strict=True)]
        return rest, [FRONT if yes else None for yes in begins]


class Plain:
    """A transformers decoder, with or without LoRA, run on padded batches; logits only where they are read.

    Args:
        autocast: dtype of the matrix products, for weights kept in float32; None: the weights' own.
    """

    def __init__(self, model: Any, tokenizer: Any, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast
        self.pad = pad_token_id(tokenizer)
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
        rows = [[*text, *target] for text, target in zip(texts, targets, strict=True)]
        ids, mask = padded(rows, self.device, value=self.pad)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        at = torch.tensor(target_places(texts, targets), device=self.device)
        first = 0
        if "logits_to_keep" in self._accepts:
            first = int(at[:, 1].min())
            inputs["logits_to_keep"] = ids.shape[1] - first
        return self._run(inputs)[at[:, 0], at[:, 1] - first]

    def left_padded(self, texts: Ids) -> dict[str, Any]:
        """Inputs of a forward call in which every text ends at the last column."""
        ids, mask = padded(texts, self.device, side="left", value=self.pad)
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

    With targets it gets labels, as in training. Padding is on the right, where it changes no row's numbers.
    """

    def __init__(self, model: Any, tokenizer: Any, virtual_tokens: int) -> None:
        self.model, self.virtual_tokens = model, virtual_tokens
        self.pad = pad_token_id(tokenizer)
        self.device = model.get_base_model().get_input_embeddings().weight.device

    def next_logits(self, texts: Ids) -> Tensor:
        ids, mask = padded(texts, self.device, value=self.pad)
        ends = self.virtual_tokens + mask.sum(1)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[torch.arange(len(texts), device=self.device), ends - 1]

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        features = [
            {"input_ids": [*text, *target], "labels": [*[IGNORED] * len(text), *target]}
            for text, target in zip(texts, targets, strict=True)
        ]
        batch = Collator(self.pad)(features)
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels")}
        at = torch.tensor(target_places(texts, targets), device=self.device)
        logits: Tensor = self.model(**inputs).logits
        return logits[at[:, 0], self.virtual_tokens + at[:, 1]]
