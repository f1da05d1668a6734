"""The result of ``assemble``: a mapping for ``model(**batch)``, and everything else as attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..extension.contract import PlanColumn


@dataclass(frozen=True)
class PackedRows:
    """The segments of the packed layout ``[1, K, D]``: each distinct prompt once, then every row's text.

    Segments are the G distinct prompts, then the B rows; a segment may be empty.
    """

    lengths: list[int]
    """[G + B], known on the host."""
    prompts: list[int]
    """[G]: the prompt ids that the batch uses, in their order of appearance."""
    row_prompts: list[int]
    """[B]: which of ``prompts`` a row uses, -1 for none."""
    row_ids: Tensor
    """[K] int64: the row of each token, -1 in a prompt."""
    plan: Tensor = field(repr=False)
    """[G + B + 1, 4] int64: a line for each segment with the columns of ``PlanColumn``; the last one starts at K."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[G + B + 1] int32: the first slot of each segment, then K."""
        return self.plan[:, PlanColumn.SLOT].to(torch.int32)


@dataclass(eq=False)  # not frozen: that would triple the cost of making one
class PromptedBatch(Mapping[str, Tensor]):
    """Inputs for a model, joined from prompts and tokens.

    As a mapping it contains what a transformers model needs: ``inputs_embeds``, ``attention_mask``, ``labels`` if
    they were given, and ``position_ids`` only if a model could not count them itself (left padding, packed). So
    ``model(**batch)`` also works for models without position ids, or with their own numbering (RoBERTa).

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
    """[5] int64 on the device, what the checks of values read; None if they were skipped."""

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
        """Values per slot, aligned with ``input_ids`` again: prompt positions are dropped, padding is filled.

        Args:
            values: [B, S, ...] or [1, K, ...], such as logits or hidden states.
            fill: value at padding positions of ``input_ids``.

        Returns:
            [B, T, ...]
        """
        flat = values.flatten(0, 1)
        if flat.shape[0] == 0:
            return values.new_full((*self.token_slots.shape, *flat.shape[1:]), fill)
        padding = self.token_slots < 0
        aligned = flat[self.token_slots.clamp(min=0)]
        return aligned.masked_fill(padding.view(*padding.shape, *[1] * (flat.dim() - 1)), fill)
