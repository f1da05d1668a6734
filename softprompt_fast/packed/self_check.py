"""Compares a packed batch with each of its rows run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.precision import float32_precision, float32_products
from ..hf.embedding import vectors_like
from ..prompts.selection import Selection

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Tolerance for packed against row-by-row logits, relative to the largest logit."""
ROUNDED = {"tf32": torch.float16, "bf16": torch.bfloat16}
"""Dtypes as precise as the products of float32 matrices can be."""
GRADIENT_SHARE = 0.25
"""Weight of a relative difference of gradients: a backward pass rounds several times as much as a forward pass. A lost
gradient differs by 1, which is more than every tolerance."""
SLACK = 2.0
"""Factor on the tolerance for deep prompts: a failed check refuses them, while plain prompts then only run slower. In
bfloat16 correct batches differ by up to 0.11 (SmolLM2-135M), batches with wrong positions or a lost virtual token by
0.23 and more."""
CHECKED_ROWS = 8
"""Largest number of rows of a batch that are compared."""


class RowAlone(Protocol):
    """Runs one row by itself: logits [M, V] at `places` [M] among its tokens [T]."""

    def __call__(
        self,
        prompt: Tensor | None,
        input_ids: Tensor,
        places: Tensor,
        *,
        gradient: bool,
        update: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...


def tolerance(model: Any, slack: float = 1.0) -> float:
    """The largest relative difference that rounding explains, in the precision in which the model computes.

    Args:
        slack: factor on it.
    """
    like = vectors_like(model.get_input_embeddings())
    device = like.device.type
    rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    if rounded == torch.float32:
        rounded = ROUNDED.get(float32_precision(like.device), rounded)
    if getattr(model, "is_loaded_in_8bit", False):  # its products round to 8 bits and run in half precision
        rounded = torch.bfloat16
    return TOLERANCE[rounded] * slack


def exact_products(model: Any) -> AbstractContextManager[None]:
    """Within it, the products of a float32 model are not rounded, whatever the user has set."""
    like = vectors_like(model.get_input_embeddings())
    rounds = like.dtype == torch.float32 and float32_precision(like.device) != "ieee"
    return float32_products("highest" if rounds else None)


def checked_rows(rows: int) -> list[int]:
    """The rows of a batch to compare: at most CHECKED_ROWS, spread over the batch."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), dtype=torch.float32).round().long().tolist()  # type: ignore[no-any-return]


def compare_with_rows_alone(
    packed_logits: Callable[[Tensor], Tensor],
    row_alone: RowAlone,
    selection: Selection,
    input_ids: Tensor,
    token_slots: Tensor,
) -> float:
    """The largest difference between a packed batch and each of its rows run alone.

    Compared are logits in the middle and at the end of each row, relative to the largest logit. Where gradients are
    recorded, the gradients of the prompts and of their token updates are compared too, relative to their norms.

    Args:
        packed_logits: runs the packed batch; slots [M] -> logits [M, V].
        row_alone: runs a single row.
        selection: the prompts of the rows.
        input_ids: [B, T]
        token_slots: [B, T], the slot of each real token in the packed batch, -1 at padding.
    """
    factors = [factor for update in selection.updates if update is not None for factor in update]
    trained = [tensor for tensor in (*selection.prompts, *factors) if tensor.requires_grad]
    if not torch.is_grad_enabled():
        trained = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        trained = []  # a sharded model's backward needs every rank, but their rows may use different prompts
    row_gradients = [torch.zeros_like(tensor) for tensor in trained]
    row_logits, read = [], []
    for row, n in enumerate(selection.ids):
        real = token_slots[row] >= 0
        slots = token_slots[row][real]
        if not len(slots):
            continue
        prompt, update = (selection.prompts[n], selection.updates[n]) if n >= 0 else (None, None)
        places = torch.tensor([len(slots) // 2, len(slots) - 1], device=slots.device)
        logits = row_alone(prompt, input_ids[row][real], places, gradient=bool(trained), update=update).double()
        if logits.requires_grad:  # row by row, so that only one row's graph is in memory
            for total, gradient in zip(row_gradients, _gradients(logits, trained), strict=True):
                total += gradient
        row_logits.append(logits.detach())
        read.append(slots[places])
    if not row_logits:
        return 0.0
    expected = torch.cat(row_logits)
    logits = packed_logits(torch.cat(read)).double()
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if trained and logits.requires_grad:
        for packed, alone in zip(_gradients(logits, trained), row_gradients, strict=True):
            relative = ((packed - alone).norm() / alone.norm().clamp(min=1e-30)).item()
            difference = max(difference, GRADIENT_SHARE * relative)
    return difference


def _gradients(logits: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the sum of squares of the logits; zeros for a tensor that the logits do not depend on."""
    if not tensors:
        return []
    gradients = torch.autograd.grad(logits.square().sum(), list(tensors), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
