"""Whether one prompt scores worse than another on the same rows: tests on pairs, and the difference's interval."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..evaluation.intervals import Z, mean_and_error
from ..evaluation.scores import RowScores
from ..evaluation.statistics import mcnemar_of_counts

ALPHA = 0.05
"""A difference with a smaller p-value, two-sided, is called significant."""
MCNEMAR, PAIRED_T = "exact McNemar test", "paired t-test"


@dataclass(frozen=True)
class Difference:
    """How much worse a prompt is than another, on the same rows."""

    metric: str
    """"loss" or "accuracy"."""
    worse_by: float
    """Accuracy lost, or loss gained; negative if the prompt is better."""
    low: float | None
    """95 % interval of ``worse_by``; None: too few rows for one."""
    high: float | None
    p_value: float
    """Two-sided."""
    test: str
    rows: int

    @property
    def significantly_worse(self) -> bool:
        return self.worse_by > 0 and self.p_value < ALPHA

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"significantly_worse": self.significantly_worse}


def compare_scores(scores: RowScores, reference: RowScores, by: str) -> Difference:
    """Compares a prompt with a reference.

    Args:
        by: "loss": a paired t-test, which detects differences on far fewer rows. "accuracy", if the task has one:
            McNemar's exact test.

    Raises:
        ValueError: the scores are from different numbers of rows.
    """
    if len(scores.losses) != len(reference.losses):
        raise ValueError(
            f"`scores` must hold the reference's {len(reference.losses)} rows, got {len(scores.losses)} rows"
        )
    if by == "loss" or scores.correct is None or reference.correct is None:
        return _losses(scores.losses - reference.losses, reference.weights)
    lost = int((reference.correct & ~scores.correct).sum())
    gained = int((scores.correct & ~reference.correct).sum())
    return _accuracies(lost, gained, len(scores.losses))


def _accuracies(lost: int, gained: int, rows: int) -> Difference:
    """With Agresti and Min's interval (2005): half a row is added to each cell, so its width is never 0."""
    difference = lost - gained
    half = Z * math.sqrt(lost + gained + 1 - difference * difference / (rows + 2)) / (rows + 2)
    centre = difference / (rows + 2)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference("accuracy", difference / rows, low, high, mcnemar_of_counts(lost, gained), MCNEMAR, rows)


def _losses(differences: Tensor, weights: Tensor) -> Difference:
    """The mean loss is a ratio of sums (loss per token); ``error`` is the standard error of that ratio."""
    from scipy.stats import t

    rows = len(differences)
    if rows < 2:
        mean = (differences.sum() / weights.sum()).item()
        return Difference("loss", mean, None, None, 1.0, PAIRED_T, rows)
    mean, error = mean_and_error(differences, weights)
    if error == 0.0:
        return Difference("loss", mean, mean, mean, 1.0 if mean == 0.0 else 0.0, PAIRED_T, rows)
    half = error * float(t.ppf(0.975, rows - 1))
    p = 2 * float(t.sf(abs(mean) / error, rows - 1))
    return Difference("loss", mean, mean - half, mean + half, p, PAIRED_T, rows)
