"""A search's plan, progress and result for the terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.scores import describe_scores
from .budget import SearchPlan
from .result import REPORT_FILE, SearchResult
from .significance import ALPHA, Difference


def status(console: Console, text: str) -> AbstractContextManager[Any]:
    """A line that is shown while something runs; nothing where the output is not a terminal."""
    return console.status(text) if console.is_terminal else nullcontext()


def print_plan(plan: SearchPlan, console: Console) -> None:
    table = Table("rung", "candidates", "steps each", "steps up to its end", "held-out rows", title="Plan")
    for number, rung in enumerate(plan.rungs, 1):
        table.add_row(*map(str, (number, rung.candidates, rung.steps, rung.total_steps, rung.rows)))
    console.print(table)
    console.print(
        f"a full run: {plan.full_steps} steps; the search: about {plan.most_steps} steps, estimated cost "
        f"{plan.cost:.2f} full runs, limit of both: {plan.budget:g} full runs",
        highlight=False,
    )


def print_result(result: SearchResult, console: Console) -> None:
    console.print(_table(result))
    chosen = result.recommended
    console.print(f"without a prompt: {describe_scores(result.before)}", highlight=False)
    for line in verdict(result):
        console.print(line, highlight=False)
    for role, scores in result.test.items():
        console.print(f"{role}, on test rows: {describe_scores(scores)}", highlight=False)
    full = result.full_run_seconds
    console.print(
        f"{result.steps} steps, {result.seconds:.0f} s: {result.seconds / full:.1f} times the estimated "
        f"{full:.0f} s of a full run",
        highlight=False,
    )
    if chosen.last.total_steps < result.plan.full_steps:
        console.print(
            f"to train it in full: softprompt-fast train ... {result.options()}", highlight=False, soft_wrap=True
        )
    console.print(f"saved in {escape(str(result.folder))}, report: {REPORT_FILE}", highlight=False, soft_wrap=True)


def verdict(result: SearchResult) -> list[str]:
    """The recommendation and its reasons, in sentences."""
    best, chosen = result.best, result.recommended
    steps = chosen.last.total_steps
    lines = [f"recommended: {chosen.describe()} (as saved: {steps} steps): {describe_scores(chosen.last.scores)}"]
    if result.comparison is None:
        shorter = min(c.num_virtual_tokens for c in result.candidates) < chosen.num_virtual_tokens
        others = ", and shorter ones were significantly worse or dropped out in an earlier rung" if shorter else ""
        lines.append(f"it has {_first(result)}{others}")
    else:
        lines.append(f"{_first(result)}: {best.describe()}: {describe_scores(best.last.scores)}")
        lines.append(
            f"the recommended one is worse by {_difference(result.comparison)}: not significant at {ALPHA:g}, which "
            "does not mean equal"
        )
    worse = chosen.last.scores[result.metric] - result.before[result.metric]
    if (-worse if result.metric == "accuracy" else worse) >= 0:
        lines.append("it does not score above the model without a prompt: try more steps or other learning rates")
    lines.append("these rows chose the prompts, so their scores are a little too good")
    return lines


def _table(result: SearchResult) -> Table:
    several = len({c.learning_rate for c in result.candidates}) > 1
    table = Table(title=f"Candidates (-> recommended; scores: held-out {result.metric})", padding=(0, 1, 0, 0))
    columns = ["tokens", *(["rate"] if several else []), "steps", "rows", "score", "95 %", "worse by", "p"]
    for column in (*columns, "ms/row", "train s"):
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in result.candidates:
        last, metric = candidate.last, result.metric
        low, high = last.scores.get(f"{metric}_low"), last.scores.get(f"{metric}_high")
        worse, p = "best", ""
        if last.against_best is not None:
            worse = f"{last.against_best['worse_by']:.3f}"
            p = f"{last.against_best['p_value']:.2g}" + ("*" if last.against_best["significantly_worse"] else " ")
        table.add_row(
            ("-> " if candidate is result.recommended else "") + str(candidate.num_virtual_tokens),
            *([f"{candidate.learning_rate:.2g}"] if several else []),
            str(last.total_steps),
            f"{last.scores['rows']:.0f}",
            f"{last.scores[metric]:.3f}",
            "" if low is None or high is None else f"{low:.2f}-{high:.2f}",
            worse,
            p,
            f"{1000 * last.scoring_seconds / last.scores['rows']:.2f}",
            f"{sum(rung.training_seconds for rung in candidate.rungs):.1f}",
        )
    table.caption = (
        f"worse by: {result.best_by}, compared with the best of its last rung on the same rows; "
        f"*: significant at {ALPHA:g}"
    )
    return table


def _first(result: SearchResult) -> str:
    return "the lowest held-out loss" if result.best_by == "loss" else "the highest held-out accuracy"


def _difference(difference: Difference) -> str:
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f" ({difference.low:.3f} to {difference.high:.3f})"
    return f"{difference.worse_by:.3f}{interval} in {difference.metric}, p = {difference.p_value:.2g}"
