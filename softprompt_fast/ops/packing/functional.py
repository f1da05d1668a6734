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


class RowTable:
    """Where the rows of a packed sequence are, for :func:`unpack` and :func:`pack`.

    Attributes:
        table: [B, 4] int64: first slot and length of each row's own part, first slot and length of its prefix.
        width: S, at least the longest prefix + own part.
    """

    def __init__(self, table: Tensor, width: int) -> None:
        self.table = table
        self.width = width
        self._holders: dict[int, tuple[Tensor, Tensor]] = {}

    def holders(self, slots: int) -> tuple[Tensor, Tensor]:
        """Which places hold each of `slots` slots, found once for all layers. Does not wait for a GPU.

        Returns:
            places: [B * S] int64, row * S + place in the row, by the slot that is there; places of one slot ascend.
            starts: [slots + 1] int64: the places of slot s are ``places[starts[s] : starts[s + 1]]``.
        """
        if slots not in self._holders:
            slot, held = reference.slots_of_rows(self.table, self.width)
            held = held & (slot >= 0) & (slot < slots)
            by_slot, places = torch.where(held, slot, slots).flatten().sort(stable=True)
            starts = torch.searchsorted(by_slot, torch.arange(slots + 1, device=by_slot.device))
            self._holders[slots] = places, starts
        return self._holders[slots]


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(rows: RowTable, dtype: torch.dtype, *packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(_unpack(packed, rows, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rows, _, *packed = inputs
        ctx.slots, ctx.dtype = packed[0].shape[0], packed[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *_pack(grads, ctx.rows, ctx.slots, ctx.dtype))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(rows: RowTable, slots: int, dtype: torch.dtype, *unpacked: Tensor) -> tuple[Tensor, ...]:
        return tuple(_pack(unpacked, rows, slots, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rows, _, _, *unpacked = inputs
        ctx.dtype = unpacked[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *_unpack(grads, ctx.rows, ctx.dtype))


def unpack(packed: Sequence[Tensor], rows: RowTable, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Rows of a packed sequence, each after its prefix.

    Args:
        packed: tensors [K, H, E] (slots, heads, head size), such as keys and values; E may differ between them.
        rows: where the B rows are in it.
        dtype: of the result; None: that of ``packed``. The cast needs no second pass.

    Returns:
        [B, S, H, E] each: ``[prefix][own][zeros]``. Gradients of shared slots are summed in float32 in ascending rows.
    """
    return list(_Unpack.apply(rows, dtype or packed[0].dtype, *packed))


def pack(unpacked: Sequence[Tensor], rows: RowTable, slots: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The adjoint of :func:`unpack`: [B, S, H, E] each -> [K, H, E]. Slots that no row holds are zero."""
    return list(_Pack.apply(rows, slots, dtype or unpacked[0].dtype, *unpacked))


def _unpack(packed: Sequence[Tensor], rows: RowTable, dtype: torch.dtype) -> list[Tensor]:
    ops = backend.ops_for(rows.table.device)
    if ops is None:
        return reference.unpack(packed, rows.table, rows.width, dtype)
    result: list[Tensor] = ops.unpack(list(packed), rows.table, rows.width, dtype)
    return result


def _pack(unpacked: Sequence[Tensor], rows: RowTable, slots: int, dtype: torch.dtype) -> list[Tensor]:
    ops = backend.ops_for(rows.table.device)
    if ops is None:
        return reference.pack(unpacked, rows.table, slots, dtype)
    result: list[Tensor] = ops.pack(list(unpacked), *rows.holders(slots), dtype)
    return result
