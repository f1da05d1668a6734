"""Runs of slots in one growing tensor that holds compiled prompts, so that a batch can refer to any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class SlotTable:
    """Hands out runs of slots of one tensor ``[L, 2, R, H', E]``; first fit. Not safe from several threads by itself.

    A layer's slots are contiguous because attention reads them key by key.

    Args:
        shape: (L, 2, H', E) of one slot.
        limit: largest number of slots.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        limit: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        self.limit = limit
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "pin_memory": pin_memory}
        self.tensor: Tensor = torch.empty(*shape[:2], 0, *shape[2:], **self._options)
        """Replaced when the table grows; an old tensor keeps its contents for those who still read it."""
        self._free: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """R"""
        return self.tensor.shape[2]

    @property
    def free(self) -> int:
        """Slots that can still be handed out, though not always in one run."""
        return sum(count for _, count in self._free) + self.limit - self.size

    def allocate(self, count: int) -> int | None:
        """First slot of a run, or None if no run of this length is free."""
        for place, (first, length) in enumerate(self._free):
            if length >= count:
                self._free[place : place + 1] = [(first + count, length - count)] if length > count else []
                return first
        tail = self._free[-1] if self._free and sum(self._free[-1]) == self.size else (self.size, 0)
        needed = tail[0] + count
        if needed > self.limit:
            return None
        if tail[1]:
            self._free.pop()
        self._grow(min(self.limit, max(needed, 2 * self.size)), needed)
        return tail[0]

    def release(self, first: int, count: int) -> None:
        """Gives a run back."""
        runs: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, count)]):
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((start, length))
        self._free = runs

    def _grow(self, size: int, used: int) -> None:
        before = self.tensor.shape
        larger = torch.empty(*before[:2], size, *before[3:], **self._options)
        larger[:, :, : before[2]] = self.tensor
        self.tensor = larger
        if size > used:
            self._free.append((used, size - used))
