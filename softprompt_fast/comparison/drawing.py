"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base.figures import BLUE, GREY, RED, new_figure
from . import words
from .result import Comparison
from .summary import REFERENCE, MethodSummary


def scores_figure(comparison: Comparison) -> Any:
    """Each method's score with its interval and its seeds."""
    shown = comparison.scored
    figure = new_figure(7.2, 1.2 + 0.36 * max(1, len(shown)))
    panel = figure.subplots()
    _scores(panel, shown, comparison.setup.metric)
    return figure


def cost_figure(comparison: Comparison) -> Any:
    """Training time, memory, storage and cost of a prediction, method by method."""
    shown = comparison.scored
    figure = new_figure(9.4, 1.4 + 0.62 * max(1, len(shown)))
    panels = figure.subplots(2, 2).flat
    for panel, (title, values, label) in zip(panels, _costs(shown), strict=True):
        _bars(panel, shown, values, title, label)
    return figure


def overview_figure(comparison: Comparison) -> Any:
    """Scores and costs in one picture."""
    shown = comparison.scored
    figure = new_figure(10, 1.6 + 0.8 * max(1, len(shown)))
    grid = figure.add_gridspec(3, 2, height_ratios=(1.15, 1, 1))
    _scores(figure.add_subplot(grid[0, :]), shown, comparison.setup.metric)
    for at, (title, values, label) in enumerate(_costs(shown)):
        _bars(figure.add_subplot(grid[1 + at // 2, at % 2]), shown, values, title, label)
    return figure


def _scores(panel: Any, shown: Sequence[MethodSummary], metric: str) -> None:
    for place, summary in enumerate(shown):
        assert summary.score is not None and summary.score_low is not None and summary.score_high is not None
        color = RED if summary.method == REFERENCE else BLUE
        panel.plot([summary.score_low, summary.score_high], [place, place], color=color, linewidth=2)
        if len(summary.scores) > 1:
            panel.plot(summary.scores, [place] * len(summary.scores), "o", color=GREY, markersize=3, zorder=3)
        panel.plot([summary.score], [place], "o", color=color, markersize=6, zorder=4)
    _names(panel, shown)
    several = any(len(summary.scores) > 1 for summary in shown)
    panel.set_xlabel(f"{metric} on the test rows, 95 % interval{'; grey: single seeds' if several else ''}", fontsize=8)
    panel.grid(axis="x", linewidth=0.3)


def _costs(shown: Sequence[MethodSummary]) -> list[tuple[str, list[float], Any]]:
    return [
        ("training, seconds (without evaluation)", [s.train_seconds or 0.0 for s in shown], words.seconds),
        ("peak memory, of training where there is any", [_memory(s) for s in shown], words.size),
        ("stored per task", [s.stored_bytes or 0.0 for s in shown], words.size),
        ("operations per prediction, the row alone", [s.flops_per_row or 0.0 for s in shown], words.count),
    ]


def _memory(summary: MethodSummary) -> float:
    return (summary.memory_training if summary.train_seconds else summary.memory_inference) or 0.0


def _bars(panel: Any, shown: Sequence[MethodSummary], values: Sequence[float], title: str, label: Any) -> None:
    """Bars with their numbers; the axis is logarithmic if the largest is over 50 times the smallest."""
    colors = [RED if s.method == REFERENCE else BLUE for s in shown]
    bars = panel.barh(range(len(shown)), values, color=colors)
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 50 * min(positive):
        panel.set_xscale("log")
        title = f"{title}, logarithmic"
        panel.set_xlim(min(positive) / 3, max(positive) * 8)
    elif positive:
        panel.set_xlim(0, max(positive) * 1.25)
    panel.bar_label(bars, [label(value) if value > 0 else "" for value in values], padding=3, fontsize=7)
    for place, value in enumerate(values):
        if value <= 0:  # a logarithmic axis has no place for it
            panel.text(0.01, place, "none", transform=panel.get_yaxis_transform(), va="center", fontsize=7)
    _names(panel, shown)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.minorticks_off()


def _names(panel: Any, shown: Sequence[MethodSummary]) -> None:
    panel.set_yticks(range(len(shown)), [s.method for s in shown], fontsize=8)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
