"""What a monitor keeps of the rows that it has seen: counts and sums, whose size does not depend on the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Distribution:
    """New values, counted between and at the distinct values of a reference sample.

    The reference's distribution function is constant between its values. So these counts give the largest difference
    of two distribution functions, and the order of new against reference values, exactly.

    Args:
        reference: [n] the reference's values.
    """

    def __init__(self, reference: Sequence[float]) -> None:
        self.values, counts = np.unique(np.asarray(reference, dtype=np.float64), return_counts=True)
        self.reference = np.zeros(2 * len(self.values) + 1, dtype=np.int64)
        """[2 k + 1] counts of the reference: below the first value, at it, between it and the second, at that, ..."""
        self.reference[1::2] = counts
        self.now = np.zeros_like(self.reference)
        """[2 k + 1] counts of the new values in the same places."""
        self.total = 0.0
        self.lowest, self.highest = np.inf, -np.inf
        self.reference_mean = float(np.mean(reference)) if len(reference) else None

    def add(self, values: Sequence[float]) -> None:
        new = np.asarray(values, dtype=np.float64)
        at = np.searchsorted(self.values, new)
        equal = np.zeros(len(new), dtype=bool)
        inside = at < len(self.values)
        equal[inside] = self.values[at[inside]] == new[inside]
        self.now += np.bincount(2 * at + equal, minlength=len(self.now))
        self.total += float(new.sum())
        self.lowest = min(self.lowest, new.min(initial=np.inf))
        self.highest = max(self.highest, new.max(initial=-np.inf))

    @property
    def mean(self) -> float | None:
        return self.total / int(self.now.sum()) if self.now.any() else None

    def curves(self) -> tuple[Array, Array, Array]:
        """[k + 2] places, and the share of the reference's and of the new values up to each.

        The places are the reference's values, and the lowest and the highest value of all.
        """
        shares = [counts.cumsum()[1::2] / max(1, counts.sum()) for counts in (self.reference, self.now)]
        ends = min(self.values[0], self.lowest), max(self.values[-1], self.highest)
        before, after = (np.concatenate([[0.0], share, [1.0]]) for share in shares)
        return np.concatenate([ends[:1], self.values, ends[1:]]), before, after


class Vectors:
    """Count, sum and products of vectors, relative to a centre.

    Args:
        centre: [k], near the vectors, which keeps the products precise.
    """

    def __init__(self, centre: Array) -> None:
        self.centre = centre
        self.count = 0
        self.sums = np.zeros(len(centre))
        self.products = np.zeros((len(centre), len(centre)))

    def add(self, vectors: Sequence[Sequence[float]]) -> None:
        if len(vectors):
            new = np.asarray(vectors, dtype=np.float64) - self.centre
            self.count += len(new)
            self.sums += new.sum(0)
            self.products += new.T @ new

    @property
    def size(self) -> float:
        """Mean square of a vector, its centre included."""
        squares = np.trace(self.products) + 2 * self.sums @ self.centre + self.count * (self.centre @ self.centre)
        return float(squares / max(1, self.count))

    @property
    def mean(self) -> Array:
        """[k], relative to the centre."""
        return self.sums / max(1, self.count)

    @property
    def scatter(self) -> Array:
        """[k, k], sum of the products of the differences from the mean."""
        return self.products - self.count * np.outer(self.mean, self.mean)


class Recent:
    """Which rows were among the last distinct ones.

    Args:
        size: how many rows are remembered.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.order: deque[str] = deque()
        self.known: set[str] = set()

    def add(self, row: str) -> bool:
        """Remembers a row; returns whether it is a repeat."""
        if row in self.known:
            return True
        self.order.append(row)
        self.known.add(row)
        if len(self.order) > self.size:
            self.known.remove(self.order.popleft())
        return False
