"""A report as one HTML page, which needs no other file and no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .figures import history_figure, shape_figure
from .report import DRIFT, FINE, DriftTest, Report
from .table import cells_of, summary_lines

GROUPS = {"input": "Inputs", "output": "Outputs", "score": "Score"}
HISTORY = 200
"""Most earlier reports that are drawn."""
STYLE = """
:root { color-scheme: light; --line: #d9d9de; --soft: #f5f5f7; --text: #1d1d1f; --quiet: #5f6368; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; color: var(--text); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
p.quiet, li { color: var(--quiet); } ul { padding-left: 20px; margin: 8px 0; }
.status { border-radius: 8px; padding: 12px 16px; margin: 16px 0; font-weight: 600; border-left: 6px solid; }
.fine { background: #e9f6ee; border-color: #228833; }
.drift { background: #fdecee; border-color: #d1495b; }
.few { background: #fff6e0; border-color: #c99700; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--soft); font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.alarm { color: #b3263a; font-weight: 600; } .skipped { color: var(--quiet); }
.figures { display: grid; gap: 16px; margin-top: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; }
figure.alarmed { border-color: #d1495b; }
figcaption { font-weight: 600; margin-bottom: 4px; } figcaption span { color: var(--quiet); font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 640px) {
  body { padding: 16px 14px 40px; }
  thead { display: none; } table, tbody, tr, td { display: block; width: 100%; }
  tr { border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px; padding: 6px 0; }
  td { border: 0; padding: 3px 12px; display: flex; justify-content: space-between; gap: 16px; text-align: right; }
  td::before { content: attr(data-label); color: var(--quiet); text-align: left; flex: none; }
  td.number { white-space: normal; }
  td.name { font-weight: 600; text-align: left; } td.name::before, td:empty::before { content: none; }
  td:empty { display: none; }
}
"""


def html_page(report: Report, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a report.

    Args:
        history: reports on the same prompt as JSON, the oldest first, this one included; with two or more, each
            statistic is drawn over time.
    """
    kind = {FINE: "fine", DRIFT: "drift"}.get(report.status, "few")
    notes = "".join(f"<li>{escape(line)}</li>" for line in summary_lines(report))
    parts = [
        f"<h1>Prompt {escape(report.prompt)}</h1>",
        f'<p class="quiet">{escape(report.time)} &middot; content {escape(report.digest)}</p>',
        f'<div class="status {kind}">{escape(_sentence(report))}</div>',
        f"<ul>{notes}</ul>",
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
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.prompt)}: {escape(report.status)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _sentence(report: Report) -> str:
    text = report.sentence()
    return text[0].upper() + text[1:]


def _figure(test: DriftTest, svg: str, detail: str | None = None) -> str:
    detail = (test.method or "") if detail is None else detail
    # Each figure keeps its own ids: pictures on one page must not use those of each other.
    prefix = re.sub(r"\W+", "-", f"{test.name}-{detail}")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", svg)
    caption = f"{escape(test.name)} <span>{escape(detail)}</span>"
    return f"<figure{' class=alarmed' if test.alarm else ''}><figcaption>{caption}</figcaption>{svg}</figure>"


def _table(tests: Sequence[DriftTest]) -> str:
    heads = ("reference", "now", "statistic", "p", "p (Holm)", "result")
    rows = []
    for test in tests:
        cells = cells_of(test)
        result, style = ("not tested", "skipped") if test.skipped else ("no drift found", "")
        if test.alarm:
            result, style = "drift", "alarm"
        numbers = "".join(
            f'<td class="number" data-label="{head}">{escape(cell)}</td>'
            for head, cell in zip(heads[:-1], cells, strict=True)
        )
        rows.append(
            f'<tr><td class="name">{escape(test.name)}</td>{numbers}'
            f'<td class="{style}" data-label="result">{escape(result)}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("test", *heads))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
