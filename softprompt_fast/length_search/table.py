"""A search's plan and result for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.scores import describe_scores
from .budget import SearchPlan
from .result import FILE, Candidate, SearchResult
from .significance import ALPHA, Difference


def print_plan(plan: SearchPlan, console: Console) -> None:
    table = Table("rung", "candidates", "steps each", "steps up to its end", "held-out rows", title="Plan")
    for number, rung in enumerate(plan.rungs, 1):
        table.add_row(*map(str, (number, rung.candidates, rung.steps, rung.total_steps, rung.rows)))
    console.print(table)
    console.print(
        f"a full run: {plan.full_steps} steps; the search: about {plan.most_steps} steps, estimated cost "
        f"{plan.cost:.2f} full runs, limit {plan.budget:g} of either",
        highlight=False,
    )


def print_result(found: SearchResult, console: Console) -> None:
    console.print(_table(found))
    chosen = found.recommended
    console.print(f"without a prompt: {describe_scores(found.before)}", highlight=False)
    for line in verdict(found):
        console.print(line, highlight=False)
    for role, scores in found.test.items():
        console.print(f"{role}, on rows that chose nothing: {describe_scores(scores)}", highlight=False)
    console.print(
        f"{found.steps} steps, {found.seconds:.0f} s: {found.seconds / found.full_run_seconds:.1f} times the estimated "
        f"{found.full_run_seconds:.0f} s of a full run",
        highlight=False,
    )
    if chosen.last.total_steps < found.plan.full_steps:
        console.print(f"a full run of it: softprompt-fast train ... {found.options()}", highlight=False, soft_wrap=True)
    console.print(f"saved in {escape(str(found.folder))}, all of it in {FILE}", highlight=False, soft_wrap=True)


def verdict(found: SearchResult) -> list[str]:
    """What is recommended and why, in sentences."""
    best, chosen = found.best, found.recommended
    steps = chosen.last.total_steps
    lines = [f"recommended: {_candidate(chosen)} (as saved: {steps} steps): {describe_scores(chosen.last.scores)}"]
    if found.comparison is None:
        shorter = min(c.num_virtual_tokens for c in found.candidates) < chosen.num_virtual_tokens
        behind = ", and shorter ones were significantly worse, or fell behind after fewer steps" if shorter else ""
        lines.append(f"it has {_first(found)}{behind}")
    else:
        lines.append(f"{_first(found)}: {_candidate(best)}: {describe_scores(best.last.scores)}")
        lines.append(
            f"the recommended one is worse by {_difference(found.comparison)}: not significant at {ALPHA:g}, which is "
            "not to say equal"
        )
    worse = chosen.last.scores[found.metric] - found.before[found.metric]
    if (-worse if found.metric == "accuracy" else worse) >= 0:
        lines.append("it does not score above the model without a prompt: try more steps or other learning rates")
    lines.append("these rows chose the prompts, so their scores are a little too good")
    return lines


def _table(found: SearchResult) -> Table:
    several = len({c.learning_rate for c in found.candidates}) > 1
    table = Table(title=f"Candidates (-> recommended; scores: held-out {found.metric})", padding=(0, 1, 0, 0))
    columns = ["tokens", *(["rate"] if several else []), "steps", "rows", "score", "95 %", "worse by", "p"]
    for column in (*columns, "ms/row", "train s"):
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in found.candidates:
        last, metric = candidate.last, found.metric
        low, high = last.scores.get(f"{metric}_low"), last.scores.get(f"{metric}_high")
        worse, p = "best", ""
        if last.against_best is not None:
            worse = f"{last.against_best['worse_by']:.3f}"
            p = f"{last.against_best['p_value']:.2g}" + ("*" if last.against_best["significantly_worse"] else " ")
        table.add_row(
            ("-> " if candidate is found.recommended else "") + str(candidate.num_virtual_tokens),
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
        f"worse by: {found.best_by}, against the best of its last rung on the same rows; *: significant at {ALPHA:g}"
    )
    return table


def _first(found: SearchResult) -> str:
    return "the lowest held-out loss" if found.best_by == "loss" else "the highest held-out accuracy"


def _candidate(candidate: Candidate) -> str:
    count = candidate.num_virtual_tokens
    return f"{count} token{'s' if count > 1 else ''} at learning rate {candidate.learning_rate:.2g}"


def _difference(difference: Difference) -> str:
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f" ({difference.low:.3f} to {difference.high:.3f})"
    return f"{difference.worse_by:.3f}{interval} in {difference.metric}, p = {difference.p_value:.2g}"
