"""The order of training rows. It depends on seed and epoch only, and gives each task the same share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

MEGA_BATCH = 50
"""Rows are sorted by length within groups of this many batches, or a quarter of all: the order stays random."""


class TaskSampler(Sampler[int]):
    """Every batch of ``rows * tasks`` indices holds ``rows`` of each task.

    An epoch is one pass over the task with the most rows; the rows of other tasks are repeated, each time in another
    order. The order depends on seed and epoch only, so a resumed run sees the same rows as an uninterrupted one.

    Args:
        tasks: the lengths of each task's rows; indices count through all tasks.
        rows: rows of each task in a batch.
        by_length: puts rows of similar length together. This saves padding, but length may correlate with the label,
            so batches differ more than random ones.
    """

    def __init__(self, tasks: Sequence[Sequence[int]], rows: int, seed: int, *, by_length: bool) -> None:
        self.tasks, self.rows, self.seed, self.by_length = tasks, rows, seed, by_length
        self.epoch = 0
        self.most = max(map(len, tasks))

    def __len__(self) -> int:
        return self.most * len(self.tasks)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start, every = 0, []
        for number, lengths in enumerate(self.tasks):
            draw = random.Random(f"{self.seed} {self.epoch} {number}")
            order: list[int] = []
            while len(order) < self.most:
                order += draw.sample(range(len(lengths)), len(lengths))
            every.append([[start + i for i in batch] for batch in self._batches(order[: self.most], lengths, draw)])
            start += len(lengths)
        for batches in zip(*every, strict=True):
            for batch in batches:
                yield from batch

    def _batches(self, order: list[int], lengths: Sequence[int], draw: random.Random) -> list[list[int]]:
        """The remaining rows are the last batch."""
        whole = len(order) // self.rows * self.rows
        if self.by_length:
            most = self.rows * max(1, min(MEGA_BATCH, whole // (4 * self.rows)))
            parts = [
                sorted(order[at : min(at + most, whole)], key=lambda i: lengths[i]) for at in range(0, whole, most)
            ]
            order = [i for part in parts for i in part] + order[whole:]
        batches = [order[at : at + self.rows] for at in range(0, whole, self.rows)]
        draw.shuffle(batches)
        return batches + ([order[whole:]] if whole < len(order) else [])
