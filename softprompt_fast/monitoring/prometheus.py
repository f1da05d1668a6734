"""A report in Prometheus' text format, for the text-file collector of its node exporter or a scrape."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from .report import DRIFT, TOO_FEW, Report

PREFIX = "softprompt_monitor"


def prometheus_text(report: Report) -> str:
    """The report's numbers as gauges, each with the label ``prompt``."""
    own = {"prompt": report.prompt, "digest": report.digest}
    tests = [(test, own | {"test": test.name, "group": test.group}) for test in report.tests]
    gauges: list[tuple[str, str, Iterable[tuple[dict[str, str], float | None]]]] = [
        ("drift", "1 if a test raised an alarm, 0 if none did.", [(own, float(report.status == DRIFT))]),
        ("judged", "0 if there were too few rows for any test.", [(own, float(report.status != TOO_FEW))]),
        ("rows", "Distinct rows.", [(own, report.rows)]),
        ("repeated_rows", "Rows left out because they repeat an earlier text.", [(own, report.repeats)]),
        ("error_rows", "Rows without an answer.", [(own, report.errors)]),
        ("reference_rows", "Distinct rows of the reference.", [(own, report.reference_rows)]),
        ("time_seconds", "When the report was made.", [(own, datetime.fromisoformat(report.time).timestamp())]),
        ("statistic", "Statistic of a test.", [(labels, test.statistic) for test, labels in tests]),
        ("p_value", "p of a test, corrected by Holm's method.", [(labels, test.corrected_p) for test, labels in tests]),
        ("alarm", "1 if a test raised an alarm.", [(lb, float(t.alarm)) for t, lb in tests if t.p is not None]),
        ("value", "Mean or share of the new rows.", [(labels, test.now) for test, labels in tests]),
        ("reference_value", "The same of the reference.", [(labels, test.reference) for test, labels in tests]),
        ("accuracy", "Share of right answers.", [(own, report.scores.get("now", {}).get("accuracy"))]),
    ]
    lines = []
    for name, about, samples in gauges:
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            lines += [f"# HELP {PREFIX}_{name} {about}", f"# TYPE {PREFIX}_{name} gauge"]
            lines += [f"{PREFIX}_{name}{{{_labels(labels)}}} {value!r}" for labels, value in known]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
