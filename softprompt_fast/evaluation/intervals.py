"""Confidence intervals of proportions and means."""

from __future__ import annotations

import math

from torch import Tensor

Z = 1.959964
"""Of 95 % intervals."""


def mean_interval(sums: Tensor, weights: Tensor) -> tuple[float, float]:
    """The 95 % interval of ``sums.sum() / weights.sum()`` over two or more rows drawn at random."""
    mean = (sums.sum() / weights.sum()).item()
    spread = (sums - mean * weights).square().sum().div(len(sums) - 1).sqrt().item()
    half = Z * spread * math.sqrt(len(sums)) / weights.sum().item()
    return mean - half, mean + half


def wilson_interval(correct: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if rows == 0:
        return 0.0, 1.0
    share = correct / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)
