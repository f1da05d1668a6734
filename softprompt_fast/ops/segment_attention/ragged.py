"""Keys of every segment one after the other, prefix first: what variable-length attention reads.

Queries need no such copy: in the packed layout segments already follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend

IntArray = npt.NDArray[np.int64]
Line = tuple[int, int, int, int]
"""First slot and length of a segment's own part, first slot and length of its prefix."""


@dataclass(frozen=True)
class HostPlan:
    """A :class:`RaggedPlan` on the host."""

    parts: tuple[IntArray, ...]
    """``cu_queries``, ``cu_keys``, ``sources``, ``places`` and ``starts``."""
    max_queries: int
    max_keys: int


def host_plan(lines: Sequence[Line], prefix_slots: int | None = None) -> HostPlan | None:
    """The plan of these segments. None: they do not follow one another from slot 0 on.

    Args:
        prefix_slots: slots of the tensor that holds the prefixes; None: they are among the segments' own.
    """
    table = np.array(lines, dtype=np.int64).reshape(-1, 4)
    first, length, prefix, before = table.T
    ends = np.concatenate([[0], np.cumsum(length)])
    if not np.array_equal(first[length > 0], ends[:-1][length > 0]):
        return None
    slots, shift = int(ends[-1]), 0
    if prefix_slots is not None:
        slots, shift = slots + prefix_slots, slots
    keys = np.concatenate([[0], np.cumsum(length + before)])
    at = np.arange(keys[-1]) - np.repeat(keys[:-1], length + before)  # place in the segment
    own_first, prefix_first, border = (np.repeat(x, length + before) for x in (first, prefix, before))
    sources = np.where(at < border, prefix_first + at + shift, own_first + at - border)
    places = np.argsort(sources, kind="stable")
    starts = np.searchsorted(sources[places], np.arange(slots + 1))
    return HostPlan(
        (ends, keys, sources, places, starts),
        int(length.max(initial=0)),
        int((length + before).max(initial=0)),
    )


@dataclass(eq=False)
class RaggedPlan:
    """Where the keys of a packed batch go: C of them in all."""

    cu_queries: Tensor
    """[segments + 1] int32: cumulative numbers of queries."""
    cu_keys: Tensor
    """[segments + 1] int32: cumulative numbers of keys."""
    max_queries: int
    max_keys: int
    sources: Tensor
    """[C]: the slot of each key. Slots of prefixes count on after the own ones if prefixes are in another tensor."""
    places: Tensor
    """[C]: places of the keys, by their slot; those of one slot ascend."""
    starts: Tensor
    """[slots + 1]: the places of slot s are ``places[starts[s] : starts[s + 1]]``."""

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """What every library wants after queries, keys and values."""
        return self.cu_queries, self.cu_keys, self.max_queries, self.max_keys

    @classmethod
    def of(cls, lines: Sequence[Line], device: torch.device, prefix_slots: int | None = None) -> RaggedPlan | None:
        """:func:`host_plan`, on a device."""
        plan = host_plan(lines, prefix_slots)
        if plan is None:
            return None
        moved = torch.from_numpy(np.concatenate(plan.parts))
        if device.type == "cuda":  # one copy, which does not wait
            moved = moved.pin_memory()
        moved = moved.to(device, non_blocking=True)
        cu_queries, cu_keys, *rest = moved.split([len(part) for part in plan.parts])
        return cls(cu_queries.to(torch.int32), cu_keys.to(torch.int32), plan.max_queries, plan.max_keys, *rest)


class _RaggedKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: RaggedPlan, own: Tensor, prefix: Tensor | None) -> Tensor:
        ctx.plan, ctx.slots = plan, [own.shape[0], *([] if prefix is None else [prefix.shape[0]])]
        if prefix is None or not len(prefix):
            return own.index_select(0, plan.sources)
        slots = own.shape[0]
        from_own = own.index_select(0, plan.sources.clamp(max=slots - 1))
        from_prefix = prefix.index_select(0, (plan.sources - slots).clamp(min=0))
        return torch.where((plan.sources < slots)[:, None, None], from_own, from_prefix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan: RaggedPlan = ctx.plan
        ops = backend.ops_for(grad.device)
        if ops is not None:
            (slots,) = ops.pack([grad[None]], plan.places, plan.starts, grad.dtype)
        else:
            wide = torch.promote_types(grad.dtype, torch.float32)
            slots = grad.new_zeros(sum(ctx.slots), *grad.shape[1:], dtype=wide)
            slots = slots.index_add_(0, plan.sources, grad.to(wide)).to(grad.dtype)
        own, *prefix = slots.split(ctx.slots)
        return None, own, prefix[0] if prefix else None


def ragged_keys(plan: RaggedPlan, own: Tensor, prefix: Tensor | None) -> Tensor:
    """Keys or values [K, H', E] and those of prefixes [R, H', E] (None: the same) -> [C, H', E].

    Gradients of shared prefixes are summed in float32, in the order of segments.
    """
    result: Tensor = _RaggedKeys.apply(plan, own, prefix)
    return result
