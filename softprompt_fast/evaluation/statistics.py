"""Bootstrap intervals, and tests of two methods on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]

RESAMPLES = 9999
BATCH = 200
"""Resamples at a time: bounds memory."""


def bootstrap_interval(values: Array, weights: Array | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean over rows drawn again with replacement.

    Args:
        values: [rows], sums or means of each row.
        weights: [rows], such as the tokens of each response; the mean is the sum of values by the sum of weights.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(values) < 2:
        mean = float(values.sum() / weights.sum())
        return mean, mean

    def ratio(sums: Array, counts: Array, axis: int = -1) -> Array:
        ratios: Array = sums.sum(axis) / counts.sum(axis)
        return ratios

    result = stats.bootstrap(
        (values, weights),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mcnemar(first: Array, second: Array) -> float:
    """Exact two-sided p of two methods' right answers [rows], boolean (McNemar 1947)."""
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    return mcnemar_of_counts(int((first & ~second).sum()), int((~first & second).sum()))


def mcnemar_of_counts(lost: int, gained: int) -> float:
    """The same from the numbers of rows that only one of the two gets right; by chance they are equal."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def paired_permutation(first: Array, second: Array, *, seed: int = 0) -> float:
    """Two-sided p of a mean difference, rows' signs flipped at random (in all ways if there are few rows)."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(difference) < 2 or not difference.any():
        return 1.0

    def mean(values: Array, axis: int = -1) -> Array:
        means: Array = values.mean(axis)
        return means

    result = stats.permutation_test(
        (difference,),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(result.pvalue))


def holm(pvalues: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979)."""
    order = sorted(range(len(pvalues)), key=lambda i: pvalues[i])
    corrected = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        corrected[i] = largest
    return corrected
