"""The comparison as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import words
from .result import Comparison


def print_comparison(comparison: Comparison, console: Console) -> None:
    setup = comparison.setup
    rows = setup.rows
    console.print(
        f"{setup.data}: {setup.model}, {rows['train']} training, {rows['validation']} validation and "
        f"{rows['test']} test rows",
        markup=False,
        highlight=False,
    )
    scores = Table("method", setup.metric, "95 %", "sd (seeds)", "difference", "p", title="Scores")
    costs = Table("method", "trained", "stored", "training", "memory", "1,000 rows", "front", title="Costs")
    for summary in comparison.summaries:
        if summary.score is None:
            scores.add_row(summary.method, escape(summary.status))
            continue
        scores.add_row(
            summary.method,
            f"{summary.score:.3f}",
            f"{summary.score_low:.3f}-{summary.score_high:.3f}",
            "" if summary.score_sd is None else f"{summary.score_sd:.3f} ({len(summary.seeds)})",
            "" if summary.difference is None else f"{summary.difference:+.3f}",
            words.p_value(summary.p_holm),
        )
        trained = bool(summary.train_seconds)
        costs.add_row(
            summary.method,
            words.count(summary.trainable_parameters) if trained else "",
            words.size(summary.stored_bytes),
            words.seconds(summary.train_seconds) if trained else "",
            words.size(summary.memory_training if trained else summary.memory_inference),
            words.seconds(summary.inference_seconds_per_1000),
            f"{summary.prefix_tokens:.0f}",
        )
    console.print(scores)
    console.print(costs)
    console.print(
        "difference: from prompt, p paired and corrected for the number of methods (Holm); trained: parameters; "
        "stored: per task; front: tokens in front of every row",
        style="dim",
        highlight=False,
    )
    for summary in comparison.summaries:
        for reason in summary.reasons:
            console.print(f"{summary.method}: {reason}", markup=False, highlight=False)
    console.print(comparison.verdict, markup=False, highlight=False)
