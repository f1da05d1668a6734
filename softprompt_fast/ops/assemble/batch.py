"""What ``assemble`` returns: a mapping that a model takes as ``model(**batch)``, and what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# `status` holds, per rule (`Status` in csrc/params.h), the smallest index that breaks it, or this.
NO_ERROR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class PackedRows:
    """Where everything stands in the packed layout ``[1, K, D]``: each distinct prompt once, then every row's text.

    Segments are the G distinct prompts, then the B rows; a segment may be empty.
    """

    lengths: list[int]
    """[G + B], known on the host."""
    cu_seqlens: Tensor
    """[G + B + 1] int32: the first slot of each segment, then K."""
    prompts: list[int]
    """[G]: the prompt ids that the batch uses, in their order of appearance."""
    row_prompts: list[int]
    """[B]: which of ``prompts`` a row uses, -1 for none."""
    row_ids: Tensor
    """[K] int64: the row of each token, -1 in a prompt."""


@dataclass(eq=False)  # not frozen: that would triple the cost of making one
class PromptedBatch(Mapping[str, Tensor]):
    """Inputs for a model, joined from prompts and tokens.

    As a mapping it holds what a transformers model must be told: ``inputs_embeds``, ``attention_mask``, ``labels``
    if there were any, and ``position_ids`` only where a model could not count them itself (left padding, packed). So
    ``model(**batch)`` also works for models that know no position ids, or number them in their own way (RoBERTa).

    S is the padded width, K the packed length, D the hidden size.
    """

    inputs_embeds: Tensor
    """[B, S, D], or [1, K, D] packed; dtype of the embedding. Zeros at padding."""
    attention_mask: Tensor | None
    """[B, S] in the dtype of the mask given, [B, 1, S, S] boolean or additive, or None."""
    position_ids: Tensor
    """[B, S] or [1, K] int64: counts real tokens and prompt vectors only; 0 at padding."""
    labels: Tensor | None
    """[B, S] or [1, K]: -100 on prompts and padding."""
    token_slots: Tensor
    """[B, T] int64: the slot of each input token in the flattened output, -1 for padding."""
    prompt_slots: Tensor
    """[B] (packed: [G]) int64: the slot of each prompt's first vector, -1 where there is none."""
    layout: str = "padded"
    padding_side: str = "right"
    packed: PackedRows | None = None
    status: Tensor | None = field(default=None, repr=False)

    def _model_inputs(self) -> dict[str, Tensor]:
        inputs = {"inputs_embeds": self.inputs_embeds}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        if self.layout == "packed" or self.padding_side == "left":
            inputs["position_ids"] = self.position_ids
        if self.labels is not None:
            inputs["labels"] = self.labels
        return inputs

    def __getitem__(self, key: str) -> Tensor:
        return self._model_inputs()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._model_inputs())

    def __len__(self) -> int:
        return len(self._model_inputs())

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values per slot, aligned with ``input_ids`` again: prompt positions dropped, padding filled.

        Args:
            values: [B, S, ...] or [1, K, ...], such as logits or hidden states.
            fill: what padding positions of ``input_ids`` get.

        Returns:
            [B, T, ...]
        """
        flat = values.flatten(0, 1)
        if flat.shape[0] == 0:
            return values.new_full((*self.token_slots.shape, *flat.shape[1:]), fill)
        padding = self.token_slots < 0
        aligned = flat[self.token_slots.clamp(min=0)]
        return aligned.masked_fill(padding.view(*padding.shape, *[1] * (flat.dim() - 1)), fill)
