"""From the packed layout to rows and back, for attention. Two linear maps, each the other's adjoint.

``unpack`` puts each row's prefix (the keys or values of its prompt) before its own, in one pass. ``pack`` takes rows
apart again; rows that share a prefix are summed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend
from . import reference


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, width: int, dtype: torch.dtype, *packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(_unpack(packed, table, width, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        table, _, _, *packed = inputs
        ctx.save_for_backward(table)
        ctx.slots, ctx.dtype = packed[0].shape[0], packed[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (table,) = ctx.saved_tensors
        return (None, None, None, *_pack(grads, table, ctx.slots, ctx.dtype))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, slots: int, dtype: torch.dtype, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(_pack(rows, table, slots, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        table, _, _, *rows = inputs
        ctx.save_for_backward(table)
        ctx.width, ctx.dtype = rows[0].shape[1], rows[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (table,) = ctx.saved_tensors
        return (None, None, None, *_unpack(grads, table, ctx.width, ctx.dtype))


def unpack(packed: Sequence[Tensor], table: Tensor, width: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Rows of a packed sequence, each after its prefix.

    Args:
        packed: tensors [K, H, E] (slots, heads, head size), such as keys and values; E may differ between them.
        table: [B, 4] int64: first slot and length of each row's own part, first slot and length of its prefix.
        width: S, at least the longest prefix + own part.
        dtype: of the result; None: that of ``packed``. The cast needs no second pass.

    Returns:
        [B, S, H, E] each: ``[prefix][own][zeros]``. Gradients of shared slots are summed in float32 in ascending rows.
    """
    return list(_Unpack.apply(table, width, dtype or packed[0].dtype, *packed))


def pack(rows: Sequence[Tensor], table: Tensor, slots: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The adjoint of :func:`unpack`: [B, S, H, E] each -> [K, H, E]. Slots that no row holds are zero."""
    return list(_Pack.apply(table, slots, dtype or rows[0].dtype, *rows))


def _unpack(packed: Sequence[Tensor], table: Tensor, width: int, dtype: torch.dtype) -> list[Tensor]:
    ops = backend.ops_for(table.device)
    if ops is None:
        return reference.unpack(packed, table, width, dtype)
    result: list[Tensor] = ops.unpack(list(packed), table, width, dtype)
    return result


def _pack(rows: Sequence[Tensor], table: Tensor, slots: int, dtype: torch.dtype) -> list[Tensor]:
    ops = backend.ops_for(table.device)
    if ops is None:
        return reference.pack(rows, table, slots, dtype)
    result: list[Tensor] = ops.pack(list(rows), table, slots, dtype)
    return result
