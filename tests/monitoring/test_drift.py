"""The tests of two samples, against scipy on the values themselves and against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softprompt_fast.monitoring import drift
from softprompt_fast.monitoring.counters import Distribution, Recent, Vectors

NUMBERS = st.lists(st.integers(-4, 9).map(lambda n: n / 2), min_size=2, max_size=40)


@given(NUMBERS, NUMBERS)
def test_counts_give_the_kolmogorov_smirnov_test_of_the_values(reference: list[float], now: list[float]) -> None:
    counted = Distribution(reference)
    counted.add(now[:1])
    counted.add(now[1:])
    found, expected = drift.kolmogorov_smirnov(counted), stats.ks_2samp(reference, now)
    assert found.statistic == pytest.approx(expected.statistic, abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert counted.mean == pytest.approx(np.mean(now))
    places, _, share = counted.curves()
    assert (places[0], places[-1]) == (min(reference + now), max(reference + now)) and share[-1] == 1
    assert share[1] == pytest.approx(np.mean(np.asarray(now) <= min(reference)))


def test_many_rows_use_the_limit_distribution_as_scipy_does() -> None:
    draw = np.random.default_rng(0)
    reference, now = draw.normal(size=300), draw.normal(0.05, size=12_000)
    counted = Distribution(reference.tolist())
    counted.add(now.tolist())
    expected = stats.ks_2samp(reference, now)
    assert drift.kolmogorov_smirnov(counted).statistic == pytest.approx(expected.statistic, abs=1e-12)
    assert drift.kolmogorov_smirnov(counted).p == pytest.approx(expected.pvalue, rel=1e-9)


def vectors(values: np.ndarray) -> Vectors:
    counted = Vectors(np.full(values.shape[1], 0.3))
    counted.add(values[:7].tolist())
    counted.add(values[7:].tolist())
    return counted


def test_hotelling_of_one_number_is_the_t_test() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(40, 1)), draw.normal(0.5, size=(30, 1))
    found = drift.hotelling(vectors(a), vectors(b))
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_ind(a[:, 0], b[:, 0]).pvalue)


def test_hotelling_does_not_depend_on_the_units() -> None:
    draw = np.random.default_rng(1)
    a, b, mix = draw.normal(size=(50, 4)), draw.normal(0.2, size=(60, 4)), draw.normal(size=(4, 4))
    found, mixed = drift.hotelling(vectors(a), vectors(b)), drift.hotelling(vectors(a @ mix), vectors(b @ mix))
    assert found is not None and mixed is not None
    assert found.p == pytest.approx(mixed.p) and found.statistic == pytest.approx(mixed.statistic)


def test_p_of_hotelling_is_uniform_without_drift() -> None:
    draw = np.random.default_rng(2)
    found = [
        drift.hotelling(vectors(draw.normal(size=(60, 5))), vectors(draw.normal(size=(40, 5)))) for _ in range(400)
    ]
    assert stats.kstest([one.p for one in found if one is not None], "uniform").pvalue > 0.01


def test_hotelling_leaves_out_directions_that_do_not_vary() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(40, 2)), draw.normal(size=(40, 2))
    wider = [np.hstack([values, np.full((40, 1), 5.0), values[:, :1]]) for values in (a, b)]
    found, expected = drift.hotelling(*map(vectors, wider)), drift.hotelling(vectors(a), vectors(b))
    assert found is not None and expected is not None
    assert found.p == pytest.approx(expected.p)
    assert drift.hotelling(vectors(np.ones((40, 2))), vectors(np.ones((40, 2)))) is None


def test_label_shares() -> None:
    two = drift.shares({"a": 50, "b": 50}, {"a": 10, "b": 40})
    assert two.p == pytest.approx(stats.fisher_exact([[50, 50], [10, 40]]).pvalue) and "Fisher" in two.method
    three = drift.shares({"a": 50, "b": 30, "c": 20}, {"a": 20, "b": 60, "c": 20})
    assert three.p == pytest.approx(stats.chi2_contingency([[50, 30, 20], [20, 60, 20]]).pvalue)
    assert "chi-square" in three.method and 0 < three.statistic < 1
    assert drift.shares({"a": 50, "b": 0}, {"a": 40, "b": 0}).p == 1.0


def test_rare_labels_are_joined() -> None:
    reference = {"a": 60, "b": 60} | {f"rare{i}": 2 for i in range(10)}
    now = {"a": 60, "b": 60} | {f"rare{i}": 2 * (i % 2) for i in range(10)}
    found = drift.shares(reference, now)
    assert found.p > 0.05  # ten cells with an expected count below 5 would make a chi-square test unreliable
    assert drift.shares(reference, {"a": 10, "b": 60, "rare0": 60}).p < 1e-6


def test_scores_only_alarm_when_they_are_worse() -> None:
    assert drift.share_is_lower((90, 100), (60, 100)).p < 0.001 < 0.9 < drift.share_is_lower((60, 100), (90, 100)).p
    assert drift.fewer_right(20, 2, 100).p < 0.001 < 0.9 < drift.fewer_right(2, 20, 100).p
    assert drift.fewer_right(0, 0, 100).p == 1.0
    assert drift.share_differs((60, 100), (90, 100)).p < 0.001


def test_repeats_are_recognised_among_the_last_rows() -> None:
    recent = Recent(3)
    assert [recent.add(row) for row in "abac"] == [False, False, True, False]
    assert not recent.add("d")  # forgets a
    assert [recent.add(row) for row in "ba"] == [True, False]
    assert len(recent.known) == len(recent.order) == 3
