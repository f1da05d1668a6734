"""The order of training rows: by seed and epoch alone, every task alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

MEGA_BATCH = 50
"""Batches at most among which rows are sorted by length, and a quarter of all at most: the order stays random."""


class TaskSampler(Sampler[int]):
    """Every batch of ``rows * tasks`` indices holds ``rows`` of each task.

    An epoch is a pass over the task with the most rows; others are gone through again and again, each time in another
    order. Nothing but seed and epoch decides it, so that a resumed run sees the rows that an uninterrupted one does.

    Args:
        tasks: of each task, the lengths of its rows; indices count through all tasks.
        rows: of a task in a batch.
        by_length: rows of similar length together, where padding costs time. Length may tell of the label, so that
            batches then are less alike than random ones.
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
        """The last batch is what is left over."""
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
