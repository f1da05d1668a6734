"""Text generation of a decoder with prompts, through transformers' own ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.assemble.batch import PromptedBatch


class _TextOnly:
    """A streamer that does not see the stand-in ids of prompts and padding."""

    def __init__(self, streamer: Any, hidden: int) -> None:
        self._streamer, self._hidden = streamer, hidden

    def put(self, value: Tensor) -> None:
        if self._hidden:
            value, self._hidden = value[..., self._hidden :], 0
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def generate(model: Any, input_ids: Tensor, batch: PromptedBatch, options: dict[str, Any]) -> Any:
    """``model.generate`` on a batch with padding on the left; returns ``input_ids`` followed by the new tokens."""
    ids = _aligned_ids(input_ids, batch, batch.inputs_embeds.shape[1])
    inputs = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    return generate_with_stand_ins(model, input_ids, ids, inputs, options)


def generate_with_stand_ins(
    model: Any, input_ids: Tensor, ids: Tensor, inputs: dict[str, Any], options: dict[str, Any]
) -> Any:
    """``model.generate`` on rows that hold more than their text; returns ``input_ids`` followed by the new tokens.

    ``generate`` reads vectors or a cache in its first step, and ids for everything else (penalties, stopping,
    lengths). So each prompt position and each padding position gets a stand-in id. It is the row's own first token:
    a penalty on repeated tokens then never affects a token that the row does not hold.

    Args:
        input_ids: [B, T]
        ids: [B, S], the same tokens after prompts and padding, which have stand-in ids.
        inputs: the other arguments of the first step: vectors or a cache, and the mask.
        options: of ``generate``; lengths count ``input_ids`` and new tokens.
    """
    rows, tokens = input_ids.shape
    width = ids.shape[1]
    options = dict(options)
    for name in ("max_length", "min_length"):
        if options.get(name) is not None:
            options[name] += width - tokens
    if options.get("streamer") is not None:
        options["streamer"] = _TextOnly(options["streamer"], width - tokens)
    output = model.generate(input_ids=ids, **inputs, **options)
    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = sequences.shape[0] // max(rows, 1)
    whole = torch.cat([input_ids.repeat_interleave(copies, 0), sequences[:, width:]], 1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output


def _aligned_ids(input_ids: Tensor, batch: PromptedBatch, width: int) -> Tensor:
    """[B, S]: the text's ids at their slots, and each row's first id at all other slots."""
    real = batch.token_slots >= 0
    first = input_ids.gather(1, real.int().argmax(1, keepdim=True)) if input_ids.shape[1] else input_ids.new_zeros(1, 1)
    ids = first.expand(-1, width).flatten().clone()
    ids[batch.token_slots[real]] = input_ids[real]
    return ids.view(-1, width)
