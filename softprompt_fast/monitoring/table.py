"""A report as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.scores import describe_scores
from .report import DRIFT, FINE, DriftTest, Report

STYLES = {FINE: "bold green", DRIFT: "bold red"}


def print_report(report: Report, console: Console) -> None:
    """Prints the tests, the scores, the notes and the result."""
    table = Table("", "reference", "now", "statistic", "p", "p (Holm)", "", title=f"Prompt {escape(report.prompt)}")
    for test in report.tests:
        verdict = "[bold red]drift[/bold red]" if test.alarm else "not tested" if test.skipped else ""
        table.add_row(escape(test.name), *map(escape, cells_of(test)), verdict)
    console.print(table)
    for line in summary_lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    style = STYLES.get(report.status, "bold yellow")
    console.print(f"[{style}]{escape(report.sentence())}[/{style}]", highlight=False, soft_wrap=True)


def summary_lines(report: Report) -> list[str]:
    """Rows, methods, scores and notes in words."""
    lines = [f"{report.rows} distinct rows, compared with {report.reference_rows} {report.reference_source}"]
    methods: dict[str, list[str]] = {}
    for test in report.tests:
        if test.method is not None:
            methods.setdefault(test.method, []).append(test.name)
    lines += [f"{method}: {', '.join(names)}" for method, names in methods.items()]
    for name, words in (("reference", "recorded"), ("now", "now")):
        if (scores := report.scores.get(name)) is not None:
            lines.append(f"{words}: {scores_text(scores)}")
    reasons: dict[str, list[str]] = {}
    for test in report.tests:
        if test.skipped is not None:
            reasons.setdefault(test.skipped, []).append(test.name)
    lines += [f"not tested: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines + [f"note: {note}" for note in report.notes]


def scores_text(scores: dict[str, float]) -> str:
    if "accuracy" in scores:
        return describe_scores(scores)
    return f"loss {scores['loss']:.4f} per token ({scores['rows']:.0f} rows)"


def cells_of(test: DriftTest) -> list[str]:
    """Reference, new value, statistic, p and corrected p, as text; empty where there is none."""
    statistic = "" if test.statistic is None else f"{test.statistic_name} {test.statistic:.3f}"
    values = [_number(test, test.reference), _number(test, test.now)]
    return [*values, statistic, _p_text(test.p), _p_text(test.corrected_p)]


def _number(test: DriftTest, value: float | None) -> str:
    """A value: a share in percent, of which label if that is not clear, or a number."""
    if value is None:
        return ""
    if test.unit.startswith("share"):
        return f"{value:.1%}{test.unit.removeprefix('share')}"
    return f"{value:.3g}{' tokens' if test.unit == 'tokens' else ''}"


def _p_text(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
