"""The result of monitoring: its tests, scores and notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FINE, DRIFT, TOO_FEW = "fine", "drift", "too few rows"


@dataclass
class DriftTest:
    """A test of one property, or the reason why it was not made."""

    name: str
    """Such as "text length"."""
    group: str
    """"input", "output" or "score"."""
    unit: str
    """Unit of ``reference`` and ``now``."""
    reference: float | None
    """Mean, share or score of the reference; None: it has none."""
    now: float | None
    """The same of the new rows."""
    method: str | None = None
    statistic_name: str = ""
    statistic: float | None = None
    p: float | None = None
    corrected_p: float | None = None
    """p after Holm's correction for the number of tests that were made."""
    alarm: bool = False
    """Whether ``corrected_p`` is below the level."""
    skipped: str | None = None
    """Why the test was not made."""


@dataclass
class Shape:
    """What the report draws of a test."""

    values: list[float] = field(default_factory=list)
    """Places of distribution functions; empty: bars."""
    labels: list[str] = field(default_factory=list)
    """Names of bars."""
    reference: list[float] = field(default_factory=list)
    now: list[float] = field(default_factory=list)


@dataclass
class Report:
    """The state of a prompt after the rows that a monitor has seen."""

    prompt: str
    digest: str
    time: str
    """UTC, ISO 8601."""
    reference_source: str
    reference_rows: int
    """Distinct rows of the reference."""
    rows: int
    """Distinct new rows; the tests use these."""
    repeats: int
    """Rows left out because their text was there before."""
    errors: int
    """Rows of a log without an answer."""
    alpha: float
    """The chance of any false alarm in all tests together."""
    tests: list[DriftTest]
    scores: dict[str, dict[str, float]]
    """``reference`` and ``now``, with 95 % intervals, where rows have labels."""
    notes: list[str]
    shapes: dict[str, Shape] = field(default_factory=dict)
    """By the name of the test."""

    @property
    def status(self) -> str:
        """ "fine", "drift" or, if no test could be made, "too few rows"."""
        if any(test.alarm for test in self.tests):
            return DRIFT
        return FINE if any(test.p is not None for test in self.tests) else TOO_FEW

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key != "shapes"}
        return {"status": self.status} | values

    def sentence(self) -> str:
        """The result in words."""
        made = sum(test.p is not None for test in self.tests)
        if self.status == DRIFT:
            names = ", ".join(test.name for test in self.tests if test.alarm)
            return f"drift in {names} ({made} tests, family-wise level {self.alpha:g})"
        if self.status == TOO_FEW:
            return f"too few rows to judge: {self.rows} distinct rows, {self.reference_rows} in the reference"
        return f"fine: none of {made} tests found drift (family-wise level {self.alpha:g})"


def statistics_of(report: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """The statistic of each test of a report's JSON, and whether it raised an alarm."""
    return {
        test["name"]: (test["statistic"], test["alarm"]) for test in report["tests"] if test["statistic"] is not None
    }
