"""``Monitor``: honest alarms, few rows, repeats, scores, and a stream in constant memory."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats
from support.monitoring_cases import drawn, profile_of

from softprompt_fast.evaluation.observations import Observation
from softprompt_fast.evaluation.statistics import holm
from softprompt_fast.monitoring import DriftTest, Monitor, Report
from softprompt_fast.monitoring import monitor as monitor_module

REFERENCE = drawn(400, 0)
PROFILE = profile_of(REFERENCE)


def named(report: Report, name: str) -> DriftTest:
    return next(test for test in report.tests if test.name == name)


def test_every_test_is_named_with_its_statistic_and_corrected() -> None:
    report = Monitor(PROFILE).update(drawn(200, 1)).report()
    assert [test.name for test in report.tests] == [
        "text length",
        "unknown or rare tokens",
        "embedded texts",
        "label shares",
        "margin",
        "agreement with the bare model",
        "accuracy",
    ]
    assert all(test.method and test.statistic_name and test.statistic is not None for test in report.tests)
    assert [test.corrected_p for test in report.tests] == holm([test.p or 0.0 for test in report.tests])
    assert named(report, "margin").p == pytest.approx(
        stats.ks_2samp([one.margin for one in REFERENCE], [one.margin for one in drawn(200, 1)]).pvalue
    )
    assert report.status == "fine" and report.rows == 200 and report.reference_rows == 400
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["status"] == "fine"


def test_fresh_rows_rarely_raise_an_alarm() -> None:
    """Fewer than the level, over references and samples."""
    alarms = 0
    for seed in range(60):
        profile = profile_of(drawn(300, 2 * seed))
        alarms += Monitor(profile).update(drawn(200, 2 * seed + 1)).report().status == "drift"
    assert alarms <= 6  # 60 at level 0.05 give more than 6 in 3 of 100 cases at most


@pytest.mark.parametrize("shift", [0.4, 1.0])
def test_a_shift_is_found(shift: float) -> None:
    found = [Monitor(PROFILE).update(drawn(200, seed, shift=shift)).report().status for seed in range(1, 21)]
    assert found == ["drift"] * 20


@pytest.mark.parametrize("count", [0, 1, 3, 29])
def test_few_rows_never_raise_an_alarm(count: int) -> None:
    report = Monitor(PROFILE).update(drawn(count, 1, shift=3.0)).report()
    assert report.status == "too few rows" and not any(test.alarm for test in report.tests)
    reason = named(report, "text length").skipped
    assert reason is not None and reason == f"too few rows ({count}; 30 are needed)"


def test_a_short_reference_is_said() -> None:
    report = Monitor(profile_of(drawn(12, 0))).update(drawn(200, 1, shift=3.0)).report()
    assert report.status == "too few rows"
    assert named(report, "margin").skipped == "too few rows in the reference (12; 30 are needed)"


def test_equal_texts_count_once() -> None:
    rows = drawn(100, 1)
    once, thrice = Monitor(PROFILE).update(rows).report(), Monitor(PROFILE).update(rows * 3).report()
    assert thrice.tests == once.tests and thrice.repeats == 200 and thrice.rows == 100
    assert any("200 rows repeat" in note for note in thrice.notes)
    assert Monitor(PROFILE).update(drawn(3, 1, shift=3.0) * 100).report().status == "too few rows"
    doubled = profile_of(REFERENCE * 2)
    assert Monitor(doubled).update(rows).report().tests == once.tests


def test_a_stream_gives_the_numbers_of_the_batch() -> None:
    rows = drawn(500, 1, shift=0.1)
    batch, stream = Monitor(PROFILE).update(rows), Monitor(PROFILE)
    for start in range(0, 500, 7):
        stream.update(rows[start : start + 7])
    for one, other in zip(batch.report().tests, stream.report().tests, strict=True):
        assert one.p == pytest.approx(other.p, rel=1e-9) and one.statistic == pytest.approx(other.statistic, rel=1e-9)


def test_one_update_takes_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "CHUNK", 64)
    rows = drawn(500, 1)
    parts: list[int] = []
    watch = Monitor(PROFILE)
    added = watch._add
    monkeypatch.setattr(watch, "_add", lambda seen: (parts.append(len(seen)), added(seen)))
    assert watch.update(iter(rows)).rows == 500 and max(parts) == 64


def test_the_state_does_not_grow() -> None:
    monitor = Monitor(PROFILE, window=1000)
    sizes = []
    for seed in range(1, 9):
        monitor.update(drawn(1000, seed))
        sizes.append(len(pickle.dumps(monitor)))
    assert max(sizes[1:]) < 1.02 * sizes[1] and monitor.rows == 8000
    assert monitor.report().status == "fine"


def test_repeats_further_apart_than_the_window_count_again() -> None:
    rows = drawn(50, 1)
    assert Monitor(PROFILE, window=10).update(rows * 2).report().repeats == 0
    assert Monitor(PROFILE, window=50).update(rows * 2).report().repeats == 50


def test_the_rows_of_the_reference_are_tested_in_pairs() -> None:
    worse = [replace(one, correct=bool(one.correct) and i % 5 > 0) for i, one in enumerate(REFERENCE)]
    report = Monitor(PROFILE).update(worse).report()
    paired = named(report, "accuracy on the reference's rows")
    lost = sum(bool(one.correct) and i % 5 == 0 for i, one in enumerate(REFERENCE))
    assert paired.method is not None and "McNemar" in paired.method
    assert paired.p == pytest.approx(0.5**lost) and paired.alarm
    assert [test.name for test in report.tests if test.group == "score"] == [paired.name]
    mixed = Monitor(PROFILE).update([*worse[:40], *drawn(100, 1)]).report()
    assert [test.name for test in mixed.tests if test.group == "score"] == [paired.name, "accuracy"]
    assert named(mixed, "accuracy").now == pytest.approx(sum(bool(one.correct) for one in drawn(100, 1)) / 100)


def test_a_better_score_is_no_alarm() -> None:
    rows = [replace(one, correct=True) for one in drawn(200, 1)]
    report = Monitor(PROFILE).update(rows).report()
    assert not named(report, "accuracy").alarm
    assert report.scores["now"]["accuracy"] == 1.0 and report.scores["now"]["accuracy_low"] > 0.97


def test_rows_without_labels_have_no_score() -> None:
    report = Monitor(PROFILE).update(replace(one, correct=None) for one in drawn(200, 1)).report()
    assert named(report, "accuracy").skipped == "no labels" and report.scores == {} and report.status == "fine"


def test_entropy_is_tested_where_it_differs_from_the_margin() -> None:
    labels = ("a", "b", "c")
    profile = profile_of(drawn(200, 0, labels=labels), labels=labels)
    report = Monitor(profile).update(drawn(200, 1, labels=labels)).report()
    assert named(report, "entropy").p is not None and named(report, "label shares").method == "chi-square test"


def test_a_generation_task() -> None:
    def generated(rows: list[Observation], loss: float) -> list[Observation]:
        return [replace(one, answer=None, correct=None, loss=round(loss + one.tokens / 50, 6)) for one in rows]

    profile = profile_of(generated(REFERENCE, 1.0), kind="generation", labels=())
    report = Monitor(profile).update(generated(drawn(200, 1), 1.0)).report()
    names = [test.name for test in report.tests]
    assert "label shares" not in names and "margin of the first token" in names and report.status == "fine"
    worse = Monitor(profile).update(generated(drawn(200, 1), 2.0)).report()
    assert named(worse, "loss of the responses").alarm and worse.scores["now"]["loss"] > 2
    unlabelled = Monitor(profile).update(replace(one, loss=None) for one in generated(drawn(200, 1), 1.0)).report()
    assert named(unlabelled, "loss of the responses").skipped == "no responses"


def logged(**changes: Any) -> list[dict[str, Any]]:
    return [one.to_json() | {"digest": "0123", "prompt": "movies"} | changes for one in drawn(200, 1)]


def test_lines_of_a_log_are_rows() -> None:
    assert Monitor(PROFILE).update(logged()).report().tests == Monitor(PROFILE).update(drawn(200, 1)).report().tests
    other = Monitor(PROFILE).update(logged(reference="another")).report()
    assert named(other, "unknown or rare tokens").skipped == "the log was written without this profile"
    failed = Monitor(PROFILE).update([*logged(), {"digest": "0123", "error": "no text"}]).report()
    assert failed.errors == 1 and failed.rows == 200
    with pytest.raises(
        ValueError, match="the prompt of a logged row must be 'movies' \\(0123\\), got 'tweets' \\(9\\)"
    ):
        Monitor(PROFILE).update(logged(digest="9", prompt="tweets"))
    with pytest.raises(ValueError, match="an observation must hold row, tokens and embedding"):
        Monitor(PROFILE).update([{"text": "a raw row"}])


@pytest.mark.parametrize(("argument", "value"), [("alpha", 0), ("alpha", 1.0), ("min_rows", 1), ("window", 0)])
def test_arguments_are_checked(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be .* got {value}"):
        Monitor(PROFILE, **{argument: value})  # type: ignore[arg-type]
