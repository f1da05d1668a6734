"""Keys of every segment one after the other, prefix first: what variable-length attention reads.

Queries need no such copy: in the packed layout segments already follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing.functional import pack

Line = tuple[int, int, int, int]
"""First slot and length of a segment's own part, first slot and length of its prefix."""


@dataclass(eq=False)
class RaggedPlan:
    """Where the keys of a packed batch go: C of them in all, the most of one segment `max_keys`."""

    cu_queries: Tensor
    """[segments + 1] int32: cumulative numbers of queries."""
    cu_keys: Tensor
    """[segments + 1] int32: cumulative numbers of keys."""
    max_queries: int
    max_keys: int
    own: Tensor
    """[K]: place of each slot's key."""
    prefix_places: Tensor
    """[X]: places of the prefixes' keys."""
    prefix_slots: Tensor
    """[X]: the slots that they come from."""
    prefix_rows: Tensor
    """[segments with a prefix, longest prefix]: places of the prefixes' keys; 0 after the end of a prefix."""
    prefix_table: Tensor
    """[segments with a prefix, 4]: lines for :func:`pack`, without own parts."""

    @property
    def keys(self) -> int:
        """C"""
        return self.own.shape[0] + self.prefix_places.shape[0]

    @classmethod
    def of(cls, lines: Sequence[Line], device: torch.device) -> RaggedPlan | None:
        """The plan of these segments. None: they do not follow one another from slot 0 on."""
        table = np.array(lines, dtype=np.int64).reshape(-1, 4)
        first, length, prefix, before = table.T
        starts = np.concatenate([[0], np.cumsum(length)])
        if not np.array_equal(first[length > 0], starts[:-1][length > 0]):
            return None
        ends = np.concatenate([[0], np.cumsum(length + before)])
        rank = np.arange(before.sum()) - np.repeat(np.cumsum(before) - before, before)
        own = np.arange(length.sum()) - np.repeat(starts[:-1], length) + np.repeat(ends[:-1] + before, length)
        places = np.repeat(ends[:-1], before) + rank
        having = before > 0
        longest = int(before.max(initial=0))
        column = np.arange(longest)
        rows = np.where(column < before[having, None], ends[:-1][having, None] + column, 0)
        tables = np.zeros((int(having.sum()), 4), np.int64)
        tables[:, 2:] = table[having, 2:]
        parts = [starts, ends, own, places, np.repeat(prefix, before) + rank, rows, tables]
        moved = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        if device.type == "cuda":  # one copy, which does not wait
            moved = moved.pin_memory()
        moved = moved.to(device, non_blocking=True)
        cu_queries, cu_keys, own_places, prefix_places, prefix_slots, prefix_rows, prefix_table = moved.split(
            [part.size for part in parts]
        )
        return cls(
            cu_queries=cu_queries.to(torch.int32),
            cu_keys=cu_keys.to(torch.int32),
            max_queries=int(length.max(initial=0)),
            max_keys=int((length + before).max(initial=0)),
            own=own_places,
            prefix_places=prefix_places,
            prefix_slots=prefix_slots,
            prefix_rows=prefix_rows.view(rows.shape),
            prefix_table=prefix_table.view(tables.shape),
        )


class _RaggedKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: RaggedPlan, own: Tensor, prefix: Tensor | None) -> Tensor:
        ctx.plan, ctx.prefix_slots = plan, None if prefix is None else prefix.shape[0]
        result = own.new_empty(plan.keys, *own.shape[1:])
        result[plan.own] = own
        result[plan.prefix_places] = (own if prefix is None else prefix).index_select(0, plan.prefix_slots)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan: RaggedPlan = ctx.plan
        own = grad.index_select(0, plan.own)
        slots = own.shape[0] if ctx.prefix_slots is None else ctx.prefix_slots
        rows = grad.index_select(0, plan.prefix_rows.flatten()).view(*plan.prefix_rows.shape, *grad.shape[1:])
        if not rows.numel():
            return None, own, None if ctx.prefix_slots is None else grad.new_zeros(slots, *grad.shape[1:])
        (prefix,) = pack((rows,), plan.prefix_table, slots)  # sums in the order of rows: the same bits every time
        return (None, own + prefix, None) if ctx.prefix_slots is None else (None, own, prefix)


def ragged_keys(plan: RaggedPlan, own: Tensor, prefix: Tensor | None) -> Tensor:
    """Keys or values [K, H', E] and those of prefixes [R, H', E] (None: the same) -> [C, H', E].

    Gradients of shared prefixes are summed in float32, in the order of segments.
    """
    result: Tensor = _RaggedKeys.apply(plan, own, prefix)
    return result
