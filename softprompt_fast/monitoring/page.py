"""A report as one HTML page, which needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..base.page import Cell, bullets, document, figure, table
from .figures import history_figure, shape_figure
from .report import DRIFT, FINE, DriftTest, Report
from .table import cells_of, summary_lines

GROUPS = {"input": "Inputs", "output": "Outputs", "score": "Score"}
HISTORY = 200
"""Most earlier reports that are drawn."""


def html_page(report: Report, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a report.

    Args:
        history: reports on the same prompt as JSON, the oldest first, this one included; with two or more, each
            statistic is drawn over time.
    """
    kind = {FINE: "fine", DRIFT: "drift"}.get(report.status, "few")
    parts = [
        f"<h1>Prompt {escape(report.prompt)}</h1>",
        f'<p class="quiet">{escape(report.time)} &middot; content {escape(report.digest)}</p>',
        f'<div class="status {kind}">{escape(_sentence(report))}</div>',
        bullets(summary_lines(report)),
    ]
    for group, title in GROUPS.items():
        tests = [test for test in report.tests if test.group == group]
        if tests:
            parts += [f"<h2>{title}</h2>", _table(tests)]
            shapes = [(test, report.shapes[test.name]) for test in tests if test.name in report.shapes]
            drawn = [_figure(test, shape_figure(test, shape)) for test, shape in shapes]
            if drawn:
                parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    if len(history) > 1:
        shown = history[-HISTORY:]
        parts.append(f"<h2>Over time</h2><p class='quiet'>{len(shown)} reports; red points are alarms.</p>")
        figures = [
            _figure(test, history_figure(test.name, shown), test.statistic_name)
            for test in report.tests
            if test.statistic is not None
        ]
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    return document(f"{report.prompt}: {report.status}", parts)


def _sentence(report: Report) -> str:
    text = report.sentence()
    return text[0].upper() + text[1:]


def _figure(test: DriftTest, svg: str, detail: str | None = None) -> str:
    return figure(svg, test.name, (test.method or "") if detail is None else detail, alarmed=test.alarm)


def _table(tests: Sequence[DriftTest]) -> str:
    rows: list[list[str | Cell]] = []
    for test in tests:
        result = Cell("not tested", "skipped") if test.skipped else Cell("no drift found", "")
        rows.append([test.name, *cells_of(test), Cell("drift", "alarm") if test.alarm else result])
    return table(("test", "reference", "now", "statistic", "p", "p (Holm)", "result"), rows)
