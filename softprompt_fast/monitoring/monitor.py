"""``Monitor``: observations of new rows in, counts in constant memory, a report at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..evaluation.intervals import wilson_interval
from ..evaluation.observations import Observation
from ..evaluation.profile import Profile
from ..evaluation.statistics import holm
from . import drift
from .counters import Distribution, Recent, Vectors
from .report import DriftTest, Report, Shape

MIN_ROWS = 30
"""Fewest distinct rows, on both sides, for a test."""
WINDOW = 10_000
"""Distinct rows among which repeats are recognised."""
CHUNK = 1000
"""Rows that are added at a time: ``update`` may be given any number of them."""
CURVE_POINTS = 200
"""Most points of a curve in a report."""


class Monitor:
    """Compares new rows with a profile.

    The state has a constant size: counts at the values of the profile, sums, and digests of the last rows. Every
    statistic is that of all rows at once. The exceptions are repeats, which are recognised among the last ``window``
    distinct rows, and p values of more than 10,000 rows, which use the limit distribution of Kolmogorov and Smirnov.

    Args:
        profile: the reference.
        alpha: the chance of any false alarm in one report, 0 to 1.
        min_rows: fewest distinct rows for a test, on both sides.
        window: distinct rows among which repeats are recognised.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    def __init__(
        self, profile: Profile, *, alpha: float = 0.05, min_rows: int = MIN_ROWS, window: int = WINDOW
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"`alpha` must be between 0 and 1, got {alpha}")
        for name, value, least in (("min_rows", min_rows, 2), ("window", window, 1)):
            if value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}")
        self.profile, self.alpha, self.min_rows = profile, alpha, min_rows
        # Rows with equal texts are one piece of evidence, not several.
        self._reference = list({one.row: one for one in profile.observations}.values())
        self._recorded = {one.row: one.correct for one in self._reference}
        self._numbers = {
            name: Distribution([value for one in self._reference if (value := getattr(one, name)) is not None])
            for name in self._numbers_compared()
        }
        vectors = np.asarray([one.embedding for one in self._reference], dtype=np.float64)
        centre = vectors.mean(0) if len(vectors) else np.zeros(1)
        self._vectors = Vectors(centre), Vectors(centre)
        self._vectors[0].add(vectors)  # type: ignore[arg-type]
        self._answers = Counter(one.answer for one in self._reference if one.answer), Counter[str]()
        self._agreement = _counted(one.bare_agrees for one in self._reference), [0, 0]
        self._correct = _counted(one.correct for one in self._reference), [0, 0]
        self._unmatched = [0, 0]
        self._same = {(a, b): 0 for a in (True, False) for b in (True, False)}
        self._recent = Recent(window)
        self.rows = self.repeats = self.errors = self.matched = 0

    def _numbers_compared(self) -> dict[str, tuple[str, str, str]]:
        """Name, group and unit of the tests of each number of an observation."""
        first = "" if self.profile.kind == "classification" else " of the first token"
        tests = {
            "tokens": ("text length", "input", "tokens"),
            "new_tokens": ("unknown or rare tokens", "input", "share"),
            "margin": (f"margin{first}", "output", "probability"),
            "entropy": (f"entropy{first}", "output", "nats"),
        }
        if self.profile.kind == "classification" and len(self.profile.labels) == 2:
            del tests["entropy"]  # a function of the margin: the same test twice
        if self.profile.kind == "generation":
            tests["loss"] = ("loss of the responses", "score", "nats per token")
        return tests

    def update(self, rows: Iterable[Observation | Mapping[str, Any]]) -> Monitor:
        """Adds rows: observations, or lines of a log as mappings. Returns the monitor.

        Raises:
            ValueError: a row of a log is of another prompt, or no observation.
        """
        seen: list[Observation] = []
        for row in rows:
            if isinstance(row, Mapping):
                if (digest := row.get("digest", self.profile.digest)) != self.profile.digest:
                    raise ValueError(
                        f"the prompt of a logged row must be {self.profile.prompt!r} ({self.profile.digest}), got "
                        f"{row.get('prompt')!r} ({digest})"
                    )
                if "error" in row:
                    self.errors += 1
                    continue
                one = Observation.from_json(row)
                if row.get("reference", self.profile.tokens_digest) != self.profile.tokens_digest:
                    one = replace(one, new_tokens=None)  # counted with the tokens of another profile
            else:
                one = row
            if self._recent.add(one.row):
                self.repeats += 1
            else:
                seen.append(one)
                if len(seen) == CHUNK:
                    self._add(seen)
                    seen = []
        self._add(seen)
        return self

    def _add(self, seen: list[Observation]) -> None:
        self.rows += len(seen)
        for name, values in self._numbers.items():
            values.add([value for one in seen if (value := getattr(one, name)) is not None])
        self._vectors[1].add([one.embedding for one in seen])
        self._answers[1].update(one.answer for one in seen if one.answer)
        for one in seen:
            _count(self._agreement[1], one.bare_agrees)
            _count(self._correct[1], one.correct)
            self.matched += one.row in self._recorded
            recorded = self._recorded.get(one.row)
            if one.correct is not None and recorded is not None:
                self._same[recorded, one.correct] += 1
            else:
                _count(self._unmatched, one.correct)

    def report(self) -> Report:
        """Tests all rows that were added."""
        shapes: dict[str, Shape] = {}
        tests = [*self._input_tests(shapes), *self._output_tests(shapes), *self._score_tests(shapes)]
        made = [test for test in tests if test.p is not None]
        for test, p in zip(made, holm([test.p for test in made if test.p is not None]), strict=True):
            test.corrected_p, test.alarm = p, p < self.alpha
        return Report(
            prompt=self.profile.prompt,
            digest=self.profile.digest,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            reference_source=self.profile.source,
            reference_rows=len(self._reference),
            rows=self.rows,
            repeats=self.repeats,
            errors=self.errors,
            alpha=self.alpha,
            tests=tests,
            scores=self._scores(),
            notes=self._notes(),
            shapes=shapes,
        )

    def _input_tests(self, shapes: dict[str, Shape]) -> list[DriftTest]:
        tests = [self._number("tokens", shapes), self._number("new_tokens", shapes)]
        test = DriftTest("embedded texts", "input", "standard deviations", None, None)
        reference, now = self._vectors
        test.skipped = self._too_few(reference.count, now.count)
        if test.skipped is None:
            found = drift.hotelling(reference, now)
            if found is None:
                test.skipped = "all texts have the same embedding"
            else:
                _made(test, found, "distance")
        return [*tests, test]

    def _output_tests(self, shapes: dict[str, Shape]) -> list[DriftTest]:
        tests = []
        if self.profile.kind == "classification":
            tests.append(self._label_shares(shapes))
        tests += [self._number(name, shapes) for name in ("margin", "entropy") if name in self._numbers]
        name = "agreement with the bare model"
        test = self._shares(name, "output", *self._agreement, drift.share_differs, shapes)
        if self._agreement[1][1] == 0:
            test.skipped = "the model was not run without the prompt"
        return [*tests, test]

    def _label_shares(self, shapes: dict[str, Shape]) -> DriftTest:
        reference, now = ({label: counts[label] for label in self.profile.labels} for counts in self._answers)
        totals = [sum(counts.values()) for counts in (reference, now)]
        test = DriftTest("label shares", "output", "share", None, None)
        if (reason := self._too_few(*totals)) is not None:
            test.skipped = reason
            return test
        before, after = (
            {label: count / total for label, count in counts.items()}
            for counts, total in zip((reference, now), totals, strict=True)
        )
        most = max(before, key=lambda label: abs(after[label] - before[label]))
        test.reference, test.now, test.unit = before[most], after[most], f"share of {most}"
        shapes[test.name] = Shape([], list(before), list(before.values()), list(after.values()))
        return _made(test, drift.shares(reference, now), "Cramer's V")

    def _score_tests(self, shapes: dict[str, Shape]) -> list[DriftTest]:
        if self.profile.kind == "generation":
            return [self._number("loss", shapes)]
        reference = self._correct[0]
        same = sum(self._same.values())
        if same == 0:
            test = self._shares("accuracy", "score", reference, self._correct[1], drift.share_is_lower, shapes)
            if self._correct[1][1] == 0:
                test.skipped = "no labels"
            return [test]
        lost, gained = self._same[True, False], self._same[False, True]
        before, after = (self._same[True, True] + n for n in (lost, gained))
        paired = DriftTest("accuracy on the reference's rows", "score", "share", before / same, after / same)
        paired.skipped = self._too_few(same, same)
        if paired.skipped is None:
            _made(paired, drift.fewer_right(lost, gained, same), "difference")
        other = self._shares("accuracy", "score", reference, self._unmatched, drift.share_is_lower, shapes)
        return [paired, other] if self._unmatched[1] else [paired]

    def _number(self, name: str, shapes: dict[str, Shape]) -> DriftTest:
        values = self._numbers[name]
        title, group, unit = self._numbers_compared()[name]
        test = DriftTest(title, group, unit, values.reference_mean, values.mean)
        test.skipped = self._too_few(int(values.reference.sum()), int(values.now.sum()))
        if not values.now.any() and self.rows:
            test.skipped = {
                "new_tokens": "the log was written without this profile",
                "loss": "no responses",
            }.get(name, "a log of generated text does not hold it")
        if test.skipped is None:
            _made(test, drift.kolmogorov_smirnov(values), "D")
            places, *curves = values.curves()
            some = np.unique(np.linspace(0, len(places) - 1, CURVE_POINTS).round().astype(int))
            shapes[title] = Shape(places[some].tolist(), [], *(curve[some].tolist() for curve in curves))
        return test

    def _shares(
        self, name: str, group: str, reference: list[int], now: list[int], compare: Any, shapes: dict[str, Shape]
    ) -> DriftTest:
        before, after = (hits / rows if rows else None for hits, rows in (reference, now))
        test = DriftTest(name, group, "share", before, after)
        test.skipped = self._too_few(reference[1], now[1])
        if test.skipped is None:
            _made(test, compare((reference[0], reference[1]), (now[0], now[1])), "difference")
            assert before is not None and after is not None
            shapes[name] = Shape([], [name], [before], [after])
        return test

    def _too_few(self, reference: int, now: int) -> str | None:
        for count, where in ((now, ""), (reference, " in the reference")):
            if count < self.min_rows:
                return f"too few rows{where} ({count}; {self.min_rows} are needed)"
        return None

    def _scores(self) -> dict[str, dict[str, float]]:
        scores = {}
        for name, (right, rows) in zip(("reference", "now"), self._correct, strict=True):
            if rows:
                low, high = wilson_interval(right, rows)
                scores[name] = {"accuracy": right / rows, "accuracy_low": low, "accuracy_high": high, "rows": rows}
        if self.profile.kind == "generation":
            loss = self._numbers["loss"]
            for name, mean, counts in (
                ("reference", loss.reference_mean, loss.reference),
                ("now", loss.mean, loss.now),
            ):
                if mean is not None:
                    scores[name] = {"loss": mean, "rows": int(counts.sum())}
        return scores if "now" in scores else {}

    def _notes(self) -> list[str]:
        notes = []
        if self.repeats:
            notes.append(f"{self.repeats} rows repeat an earlier text; each text counts once")
        if self.matched:
            notes.append(f"{self.matched} rows are rows of the reference")
        if self.errors:
            notes.append(f"{self.errors} rows have no answer, but an error")
        return notes


def _made(test: DriftTest, found: drift.Outcome, statistic_name: str) -> DriftTest:
    test.method, test.statistic, test.p = found
    test.statistic_name = statistic_name
    return test


def _counted(values: Iterable[bool | None]) -> list[int]:
    counts = [0, 0]
    for value in values:
        _count(counts, value)
    return counts


def _count(counts: list[int], value: bool | None) -> None:
    """Adds a row to [rows that have a property, all rows]; None: unknown."""
    if value is not None:
        counts[0] += value
        counts[1] += 1
