"""The figure of a search: length against score, length against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..base.figures import BLUE, GREY, RED, new_figure

if TYPE_CHECKING:
    from .result import Candidate, RungResult, SearchResult

MARKERS = "os^Dv<>p*"
SPREAD = 1.06
"""Factor between neighbouring points of one length."""


def search_figure(result: SearchResult) -> Any:
    """One point per candidate and rung, with its 95 % interval; measured seconds of scoring and of training."""
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rungs = len(result.plan.rungs)
    for number in range(1, rungs + 1):
        _scores(left, result, number, rungs)
    chosen, metric = result.recommended, result.metric
    left.plot(
        [_place(result, chosen, rungs)],
        [chosen.last.scores[metric]],
        "o",
        markersize=15,
        markerfacecolor="none",
        markeredgecolor=RED,
        label=f"recommended: {chosen.num_virtual_tokens}",
    )
    left.axhline(result.before[metric], color=GREY, linestyle=":", linewidth=1, label="without a prompt")
    left.set_title(f"held-out {metric}, 95 % intervals", fontsize=9)
    left.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)
    _cost(right, result)
    ticks = sorted({c.num_virtual_tokens for c in result.candidates})
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.minorticks_off()
        panel.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        panel.set_xlabel("virtual tokens", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _scores(panel: Any, result: SearchResult, number: int, rungs: int) -> None:
    metric = result.metric
    points: list[tuple[Candidate, RungResult]] = [
        (candidate, candidate.rungs[number - 1]) for candidate in result.candidates if len(candidate.rungs) >= number
    ]
    x = [_place(result, candidate, number) for candidate, _ in points]
    y = [rung.scores[metric] for _, rung in points]
    errors = None
    if all(f"{metric}_low" in rung.scores for _, rung in points):
        errors = [
            [max(0.0, rung.scores[metric] - rung.scores[f"{metric}_low"]) for _, rung in points],
            [max(0.0, rung.scores[f"{metric}_high"] - rung.scores[metric]) for _, rung in points],
        ]
    strength = 0.35 + 0.65 * number / rungs
    panel.errorbar(
        x,
        y,
        yerr=errors,
        fmt=MARKERS[(number - 1) % len(MARKERS)],
        color=BLUE,
        alpha=strength,
        elinewidth=0.8,
        markersize=5,
        label=f"rung {number}: {points[0][1].total_steps} steps, {points[0][1].scores['rows']:.0f} rows",
    )


def _place(result: SearchResult, candidate: Candidate, number: int) -> float:
    """The x position: candidates of one length, and a candidate's rungs, are drawn side by side."""
    same_length = [c for c in result.candidates if c.num_virtual_tokens == candidate.num_virtual_tokens]
    rungs = len(result.plan.rungs)
    offset = same_length.index(candidate) * rungs + number - 1 - (len(same_length) * rungs - 1) / 2
    return float(candidate.num_virtual_tokens * SPREAD**offset)


def _cost(panel: Any, result: SearchResult) -> None:
    """Medians of each length's measurements, because the first batches of a search include one-time checks."""
    import numpy as np

    lengths = sorted({c.num_virtual_tokens for c in result.candidates})
    scoring: dict[int, list[float]] = {length: [] for length in lengths}
    training: dict[int, list[float]] = {length: [] for length in lengths}
    for candidate in result.candidates:
        for rung in candidate.rungs:
            scoring[candidate.num_virtual_tokens].append(1000 * rung.scoring_seconds / rung.scores["rows"])
            training[candidate.num_virtual_tokens].append(
                1000 * rung.training_seconds / rung.steps / result.rows_per_step
            )
    panel.plot(lengths, [float(np.median(scoring[n])) for n in lengths], "o-", color=BLUE, label="scoring")
    panel.plot(lengths, [float(np.median(training[n])) for n in lengths], "s--", color=RED, label="training")
    panel.set_ylim(bottom=0)
    panel.set_title("measured seconds per 1,000 rows", fontsize=9)
    panel.set_ylabel("seconds per 1,000 rows", fontsize=8)
    panel.legend(fontsize=7, frameon=False, loc="best")
