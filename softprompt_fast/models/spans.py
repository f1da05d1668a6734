"""Question answering: the numbers of where an answer begins and ends, and the loss of its two ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.assemble.batch import PromptedBatch
from ..packed.spans import LOGITS, POSITIONS, end_loss


def check_positions(options: dict[str, Any], rows: int) -> None:
    """Checks the ends of the answers [B] among the options of a call.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value.
    """
    given = [name for name in POSITIONS if options.get(name) is not None]
    if len(given) == 1:
        raise ValueError(f"`start_positions` and `end_positions` must be given together, got `{given[0]}` alone")
    for name in given:
        value = options[name]
        if not isinstance(value, Tensor) or value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` must be a tensor [B] of columns of input_ids, got {kind}")
        if value.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"`{name}` must have shape [{rows}] like the texts' rows, got {list(value.shape)}")


def span_loss(output: Any, batch: PromptedBatch, positions: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of the two ends of each answer [B], columns of ``input_ids``."""
    shape = output[LOGITS[0]].shape
    visible = batch.token_slots.new_ones(shape) if batch.attention_mask is None else batch.attention_mask
    start, end = (
        end_loss(output[name], visible != 0, position, batch.token_slots, batch.token_slots % shape[1])
        for name, position in zip(LOGITS, positions, strict=True)
    )
    return (start + end) / 2


def without_padding(logits: Tensor, batch: PromptedBatch, prompt_columns: int) -> Tensor:
    """The logits [B, P + T] of one end, with the smallest number at padding, so that no answer is found there."""
    padding = F.pad(batch.token_slots < 0, (prompt_columns, 0), value=False)
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min)
