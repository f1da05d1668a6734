"""Confidence intervals of proportions and means, and perplexity."""

from __future__ import annotations

import math

from torch import Tensor

Z = 1.959964
"""Half the width of a 95 % interval, in standard errors."""


def mean_and_error(sums: Tensor, weights: Tensor) -> tuple[float, float]:
    """The mean ``sums.sum() / weights.sum()`` over two or more rows drawn at random, and its standard error."""
    total = weights.sum().item()
    mean = sums.sum().item() / total
    spread = (sums - mean * weights).square().sum().div(len(sums) - 1).sqrt().item()
    return mean, spread * math.sqrt(len(sums)) / total


def mean_interval(sums: Tensor, weights: Tensor) -> tuple[float, float]:
    """The 95 % interval of ``sums.sum() / weights.sum()`` over two or more rows drawn at random."""
    mean, error = mean_and_error(sums, weights)
    return mean - Z * error, mean + Z * error


def wilson_interval(correct: int, rows: int, z: float = Z) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if rows == 0:
        return 0.0, 1.0
    share = correct / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(loss: float) -> float:
    """``exp(loss)``, of a loss per token; bounded, because a float overflows above exp(709)."""
    return math.exp(min(loss, 700.0))
