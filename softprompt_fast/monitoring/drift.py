"""Tests of two samples: each takes counts or sums, and gives a statistic and its p value. scipy computes the tests."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from .counters import Distribution, Vectors

EXACT_ROWS = 10_000
"""Most rows for the exact distribution of the Kolmogorov-Smirnov statistic; scipy's own limit."""
NO_SPREAD = 1e-14
"""Variance, relative to the mean square, that rounding alone can give."""
EXPECTED = 5
"""Smallest expected count of a cell of a chi-square test. Rarer labels are joined."""


class Outcome(NamedTuple):
    """A test that was made."""

    method: str
    statistic: float
    p: float


def kolmogorov_smirnov(values: Distribution) -> Outcome:
    """Largest difference of the two distribution functions; with ties the p value is too large, never too small."""
    n, m = int(values.reference.sum()), int(values.now.sum())
    shares = values.reference.cumsum() / n - values.now.cumsum() / m
    largest = float(np.abs(shares).max())
    if max(n, m) <= EXACT_ROWS:
        # Only the order of the values matters, so their places stand for them.
        places = np.arange(len(values.now))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the exact p can fail; scipy then takes the limit's
            p = float(stats.ks_2samp(np.repeat(places, values.reference), np.repeat(places, values.now)).pvalue)
    else:
        p = float(stats.kstwo.sf(largest, round(n * m / (n + m))))
    return Outcome("two-sample Kolmogorov-Smirnov test", largest, p)


def hotelling(reference: Vectors, now: Vectors) -> Outcome | None:
    """Distance of two mean vectors in standard deviations; None: the vectors do not vary."""
    rows = reference.count + now.count
    spread, directions = np.linalg.eigh((reference.scatter + now.scatter) / (rows - 2))
    used = spread > max(1e-9 * spread.max(), NO_SPREAD * (reference.size + now.size))
    k = int(used.sum())
    if k == 0 or rows - k - 1 < 1:
        return None
    difference = ((now.mean - reference.mean) @ directions)[used] / np.sqrt(spread[used])
    squared = float((difference**2).sum())
    t2 = squared * reference.count * now.count / rows
    p = float(stats.f.sf(t2 * (rows - k - 1) / (k * (rows - 2)), k, rows - k - 1))
    return Outcome("Hotelling's T2 test", squared**0.5, p)


def shares(reference: Mapping[str, int], now: Mapping[str, int]) -> Outcome:
    """Whether labels have the same shares: a chi-square test, for two labels Fisher's. The statistic is Cramer's V."""
    table = np.asarray([[counts.get(label, 0) for label in reference] for counts in (reference, now)], dtype=np.int64)
    table = _joined(table[:, table.sum(0) > 0])
    if table.shape[1] < 2:
        return Outcome("Fisher's exact test", 0.0, 1.0)
    found = stats.chi2_contingency(table, correction=False)
    v = float(np.sqrt(found.statistic / table.sum()))
    if table.shape[1] == 2:
        return Outcome("Fisher's exact test", v, float(stats.fisher_exact(table).pvalue))
    return Outcome("chi-square test", v, float(found.pvalue))


def _joined(table: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The table with its rarest columns joined until no expected count is too small; two columns are left at least."""
    while table.shape[1] > 2:
        totals = table.sum(0)
        if totals.min() * table.sum(1).min() >= EXPECTED * table.sum():
            break
        first, second = np.argsort(totals, kind="stable")[:2]
        table[:, second] += table[:, first]
        table = np.delete(table, first, axis=1)
    return table


def share_differs(reference: tuple[int, int], now: tuple[int, int]) -> Outcome:
    """Whether two shares differ.

    Args:
        reference, now: rows that have a property, and all rows.
    """
    return Outcome("Fisher's exact test", _difference(reference, now), _fisher(reference, now, "two-sided"))


def share_is_lower(reference: tuple[int, int], now: tuple[int, int]) -> Outcome:
    """Whether the new share is lower."""
    return Outcome("Fisher's exact test, one-sided", _difference(reference, now), _fisher(reference, now, "less"))


def fewer_right(lost: int, gained: int, rows: int) -> Outcome:
    """Whether fewer answers to the same rows are right.

    Args:
        lost, gained: rows that only the recorded and only the new answers get right.
    """
    p = float(stats.binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0
    return Outcome("McNemar's exact test, one-sided", (gained - lost) / rows, p)


def _difference(reference: tuple[int, int], now: tuple[int, int]) -> float:
    return now[0] / now[1] - reference[0] / reference[1]


def _fisher(reference: tuple[int, int], now: tuple[int, int], alternative: str) -> float:
    table = [[now[0], now[1] - now[0]], [reference[0], reference[1] - reference[0]]]
    return float(stats.fisher_exact(table, alternative=alternative).pvalue)
