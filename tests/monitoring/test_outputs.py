"""The page, the table and Prometheus' text."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console
from support.monitoring_cases import drawn, profile_of
from support.pages import check_alone

from softprompt_fast.monitoring import Monitor, Report
from softprompt_fast.monitoring.page import html_page
from softprompt_fast.monitoring.prometheus import prometheus_text
from softprompt_fast.monitoring.table import print_report

LABELS = ("negative", '<b>"positive"\\')
PROFILE = profile_of(drawn(200, 0, labels=LABELS), labels=LABELS, prompt='<i>"movies')
SAMPLE = re.compile(r'softprompt_monitor_[a-z_]+\{(\w+="(?:[^"\\\n]|\\[\\"n])*",?)+\} -?\d[\d.e+-]*')


def report(count: int = 100, shift: float = 0.0) -> Report:
    return Monitor(PROFILE).update(drawn(count, 1, shift=shift, labels=LABELS)).report()


def test_the_page_needs_no_other_file() -> None:
    page = html_page(report(shift=1.0))
    reader = check_alone(page)
    assert reader.used and "b" not in reader.tags
    assert reader.tags.count("svg") == 6 and "Drift in" in page


def test_the_page_draws_the_history() -> None:
    reports = [report(100 + day).to_json() | {"time": f"2026-01-0{day}T06:00:00+00:00"} for day in range(1, 5)]
    page = html_page(report(), reports)
    assert "Over time" in page and "4 reports" in page and page.count("<svg") == 6 + 7
    assert "Over time" not in html_page(report(), reports[:1])


def test_a_page_without_any_test() -> None:
    page = html_page(report(3))
    assert "Too few rows to judge" in page and "<svg" not in page and "not tested" in page


def test_prometheus_text() -> None:
    text = prometheus_text(report(shift=1.0))
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.endswith("\n") and all(SAMPLE.fullmatch(line) for line in samples), samples
    names = {line.partition("{")[0] for line in samples}
    assert {f"softprompt_monitor_{name}" for name in ("drift", "rows", "p_value", "statistic", "accuracy")} <= names
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} == names
    (drift,) = [line for line in samples if line.startswith("softprompt_monitor_drift{")]
    assert drift.endswith(" 1.0")
    assert "softprompt_monitor_judged" in prometheus_text(report(3))


def test_the_table_says_what_was_tested_and_why_not() -> None:
    buffer = io.StringIO()
    print_report(report(100, 1.0), Console(file=buffer, width=80))
    print_report(report(3), Console(file=buffer, width=80))
    rows = [replace(one, bare_agrees=None) for one in drawn(100, 1, labels=LABELS)]
    print_report(Monitor(PROFILE).update(rows).report(), Console(file=buffer, width=80))
    shown = buffer.getvalue()
    assert "Hotelling's T2 test: embedded texts" in shown and "p (Holm)" in shown
    assert "too few rows (3; 30 are needed)" in shown
    assert "not tested: agreement with the bare model: the model was not run without the prompt" in shown
    assert "drift in " in shown and "fine: none of 6 tests found drift (family-wise level 0.05)" in shown
