"""The comparison of candidates: tests on pairs of row scores, which candidates continue, which is recommended."""

from __future__ import annotations

import math

import pytest
import torch

from softprompt_fast.evaluation.scores import RowScores
from softprompt_fast.evaluation.statistics import mcnemar_of_counts
from softprompt_fast.length_search.result import Candidate, RungResult, judge, promote
from softprompt_fast.length_search.significance import compare_scores


def scores_of(correct: list[bool]) -> RowScores:
    hits = torch.tensor(correct)
    return RowScores((~hits).double() + 0.1, torch.ones(len(hits), dtype=torch.float64), hits.long(), hits)


def losses_of(losses: list[float], weights: list[float] | None = None) -> RowScores:
    counted = torch.ones(len(losses)) if weights is None else torch.tensor(weights)
    return RowScores(torch.tensor(losses, dtype=torch.float64), counted.double(), None, None)


def test_mcnemar_against_values_computed_by_hand() -> None:
    # 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10 and so on
    assert mcnemar_of_counts(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_of_counts(2, 8) == mcnemar_of_counts(8, 2)
    assert mcnemar_of_counts(6, 0) == pytest.approx(2 / 64) and mcnemar_of_counts(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_of_counts(3, 3) == mcnemar_of_counts(0, 0) == 1.0


def test_prompts_are_compared_row_by_row() -> None:
    reference = scores_of([True] * 30 + [False] * 10)
    worse = compare_scores(scores_of([False] * 6 + [True] * 24 + [False] * 10), reference, "accuracy")
    assert (worse.worse_by, worse.p_value, worse.rows) == (0.15, pytest.approx(2 / 64), 40)
    assert worse.significantly_worse and worse.low is not None and worse.high is not None
    # Agresti and Min: (6 - 0) / 42 +- 1.96 * sqrt(6 + 1 - 36 / 42) / 42
    half = 1.959964 * math.sqrt(7 - 36 / 42) / 42
    assert (worse.low, worse.high) == (pytest.approx(6 / 42 - half), pytest.approx(6 / 42 + half))
    # As much accuracy lost in all, but the rows disagree both ways: no longer significant.
    mixed = compare_scores(scores_of([False] * 12 + [True] * 18 + [True] * 6 + [False] * 4), reference, "accuracy")
    assert mixed.worse_by == 0.15 and mixed.p_value > 0.05 and not mixed.significantly_worse
    better = compare_scores(scores_of([True] * 40), reference, "accuracy")
    assert better.worse_by == -0.25 and better.p_value < 0.05 and not better.significantly_worse
    with pytest.raises(ValueError, match="`scores` must hold the reference's 40 rows, got 2 rows"):
        compare_scores(scores_of([True, False]), reference, "accuracy")


def test_losses_are_compared_by_a_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    a, b = [1.0, 2.5, 0.7, 4.0, 3.0], [0.8, 2.0, 0.9, 3.1, 2.2]
    difference, expected = compare_scores(losses_of(a), losses_of(b), "loss"), ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert difference.p_value == pytest.approx(float(expected.pvalue)) and difference.worse_by == pytest.approx(0.44)
    assert (difference.low, difference.high) == (
        pytest.approx(float(interval.low)),
        pytest.approx(float(interval.high)),
    )
    weighted = compare_scores(losses_of([4.0, 9.0], [2.0, 3.0]), losses_of([2.0, 6.0], [2.0, 3.0]), "loss")
    assert (weighted.worse_by, weighted.p_value) == (1.0, 0.0)  # one more per token in every row
    assert compare_scores(losses_of([1.0]), losses_of([0.5]), "loss").low is None
    same = compare_scores(losses_of(a), losses_of(a), "loss")
    assert (same.worse_by, same.p_value, same.significantly_worse) == (0.0, 1.0, False)


def candidate(number: int, length: int, correct: list[bool]) -> Candidate:
    rows = scores_of(correct)
    return Candidate(number, length, 0.1, [RungResult(1, 5, 5, rows.summary(), 1.0, 1.0, 2.0)], rows)


def hits(count: int) -> list[bool]:
    return [True] * count + [False] * (40 - count)


def test_the_best_continue_and_the_shortest_that_is_not_significantly_worse() -> None:
    bad, short, middle, good, best = (
        candidate(i, length, hits(n)) for i, (length, n) in enumerate([(1, 20), (2, 32), (5, 33), (10, 34), (20, 35)])
    )
    alive = [bad, short, middle, good, best]
    assert judge(alive, "accuracy") == (best, short)
    assert promote(alive, 3, "accuracy") == [short, good, best] and promote(alive, 2, "accuracy") == [short, best]
    assert bad.last.against_best is not None and bad.last.against_best["significantly_worse"]
    assert bad.last.against_best["worse_by"] == pytest.approx(15 / 40) and best.last.against_best is None
    alone = [bad, candidate(7, 2, hits(35)), candidate(8, 9, hits(34)), candidate(9, 20, hits(33))]
    assert promote(alone, 2, "accuracy") == alone[1:3] and promote(alone, 3, "accuracy") == alone[1:]
    equal = [candidate(0, 9, hits(30)), candidate(1, 3, hits(30))]
    assert judge(equal, "loss") == (equal[1], equal[1])
