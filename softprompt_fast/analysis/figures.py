"""Figures of analyses, interpretations, pruning and transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base.figures import BLUE, GREY, RED, SHOWN, bars, heat_map, new_figure
from .interpretation import CAVEAT, Interpretation
from .pruning import Pruned
from .results import Analysis
from .transfer import Similarity

MOST_PROMPTS = 8
"""Most prompts that get panels of their own in one figure."""


def analysis_figure(analysis: Analysis) -> Any:
    """Text lengths with their limits; then classes and baseline accuracies, or for generation response lengths."""
    classes = bool(analysis.classes)
    figure = new_figure(10, 3.4 + 0.12 * max(0, min(len(analysis.classes), SHOWN) - 10))
    left, right = figure.subplots(1, 2)
    _histogram(left, analysis.text.tokens, "texts", "tokens of the rendered text")
    marks = [(analysis.max_length, "max_length", RED, "--")]
    if analysis.context is not None:
        marks.append((analysis.context, "model's context", GREY, ":"))
    longest = analysis.text.quantiles["max"]
    for value, name, color, style in marks:
        if value <= 3 * max(longest, 1):
            left.axvline(value, color=color, linestyle=style, label=f"{name} {value}")
    note = "; ".join(f"{name} {value} (beyond)" for value, name, *_ in marks if value > 3 * max(longest, 1))
    cut = f"{analysis.cut_by_max_length:.2%} longer than max_length"
    left.set_title(f"{analysis.train_rows} texts, {cut}" + (f"\n{note}" if note else ""), fontsize=9)
    if left.get_legend_handles_labels()[0]:
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2, frameon=False, fontsize=7)
    if not classes:
        _histogram(right, analysis.target.tokens, "responses", "tokens of the response, end included")
        right.set_title("responses", fontsize=9)
        return figure
    order = sorted(analysis.classes, key=lambda label: -analysis.classes[label])
    shown = order[:SHOWN]
    title = "rows per label" if len(shown) == len(order) else f"rows per label, the {SHOWN} largest of {len(order)}"
    parts = []
    for name, scores in (("majority", analysis.majority), ("zero-shot", analysis.zero_shot)):
        if scores is not None:
            interval = f"{scores['accuracy_low']:.3f} to {scores['accuracy_high']:.3f}"
            parts.append(f"{name} accuracy {scores['accuracy']:.3f} ({interval})")
    title = "\n".join([title, *parts])
    bars(right, shown, [analysis.classes[label] for label in shown], title=title, unit="training rows")
    return figure


def interpretation_figure(interpretation: Interpretation) -> Any:
    """Norms and cosines of the first prompts' vectors, cosines between all prompts, the effect of each vector."""
    names = list(interpretation.prompts)
    drawn = dict(list(interpretation.prompts.items())[:MOST_PROMPTS])
    lines = len(drawn) + (len(names) > 1) + (interpretation.ablation is not None)
    tallest = max(len(reading.norms) for reading in drawn.values())
    height = 2.6 + 0.08 * min(tallest, SHOWN)
    figure = new_figure(11, height * lines + 0.8)
    half = len(CAVEAT) // 2
    cut = CAVEAT.index(" ", half)
    figure.suptitle(f"{CAVEAT[:cut]}\n{CAVEAT[cut + 1 :]}", fontsize=8)
    panels = figure.subplots(lines, 2, squeeze=False)
    for (left, right), (name, reading) in zip(panels, drawn.items(), strict=False):
        labels = [f"{i}: {cosine[0].token!r}" if cosine else str(i) for i, cosine in enumerate(reading.cosine)]
        bars(
            left,
            labels,
            reading.norms,
            title=f"{name}: norms; names are the nearest tokens by cosine",
            unit="norm; shaded: 5 % to 95 % of the vocabulary",
        )
        left.axvspan(
            interpretation.vocabulary_norms["p05"],
            interpretation.vocabulary_norms["p95"],
            color=GREY,
            alpha=0.3,
            linewidth=0,
            zorder=0,
        )
        heat_map(figure, right, reading.token_cosines, list(map(str, range(len(labels)))), title=f"{name}: cosines")
    at = len(drawn)
    if len(names) > 1:
        heat_map(figure, panels[at][0], interpretation.mean_cosine, names, title="prompts: cosine of mean vectors")
        heat_map(
            figure, panels[at][1], interpretation.aligned_cosine, names, title="prompts: mean cosine place by place"
        )
        at += 1
    if interpretation.ablation is not None:
        removed = interpretation.ablation
        labels = list(map(str, range(len(removed.loss_change))))
        bars(
            panels[at][0],
            labels,
            removed.loss_change,
            errors=removed.loss_change_half_width,
            colors=[BLUE if change > 0 else RED for change in removed.loss_change],
            title=f"{removed.prompt}: change of the loss without the vector",
            unit=f"blue: the vector helps; whole prompt {removed.loss:.3f}, {removed.rows} rows, 95 % intervals",
        )
        if removed.accuracy_change is None:
            panels[at][1].set_axis_off()
        else:
            bars(
                panels[at][1],
                labels,
                removed.accuracy_change,
                colors=[BLUE if change < 0 else RED for change in removed.accuracy_change],
                title=f"{removed.prompt}: change of accuracy without the vector",
                unit=f"blue: the vector helps; whole prompt {removed.accuracy:.3f}",
            )
    return figure


def pruning_figure(pruned: Pruned) -> Any:
    """Each vector's ablation loss, the removed vectors, and the scores before and after."""
    count = len(pruned.loss_changes)
    figure = new_figure(10, 2.6 + 0.1 * min(count, SHOWN))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    gone = set(pruned.removed)
    bars(
        left,
        list(map(str, range(count))),
        pruned.loss_changes,
        colors=[RED if i in gone else BLUE for i in range(count)],
        title=f"{count} vectors, {len(pruned.kept)} kept (blue), {len(gone)} removed (red)",
        unit="change of the loss on the selection rows without the vector",
    )
    score = "accuracy" if "accuracy" in pruned.held_out["before"] else "loss"
    values = [part[when][score] for part in (pruned.selection, pruned.held_out) for when in ("before", "after")]
    names = ["selection, before", "selection, after", "other rows, before", "other rows, after"]
    scores = [part[when] for part in (pruned.selection, pruned.held_out) for when in ("before", "after")]
    bars(
        right,
        names,
        values,
        errors=_intervals(scores, score),
        colors=[GREY, GREY, BLUE, RED],
        title=f"{score}, 95 % intervals",
        unit="only the other rows count: the selection rows chose",
    )
    return figure


def similarity_figure(sources: Sequence[Similarity]) -> Any:
    """Sources in their order: loss and accuracy on the target's rows, cosines with the target prompt."""
    shown = sources[:SHOWN]
    names = [source.name for source in shown]
    columns: list[tuple[str, list[float], Any]] = []
    scores = [source.scores for source in shown if source.scores is not None]
    if scores:
        for key in ("loss", "accuracy"):
            if key in scores[0]:
                columns.append((f"{key} on the target's rows", [s[key] for s in scores], _intervals(scores, key)))
    for key, title in (("mean_cosine", "cosine of mean vectors"), ("pairwise_cosine", "mean cosine of all pairs")):
        if any(getattr(source, key) is not None for source in shown):
            columns.append((title, [getattr(source, key) or 0.0 for source in shown], None))
    figure = new_figure(1.2 + 3 * len(columns), 1.6 + 0.22 * len(shown))
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for panel, (title, values, errors) in zip(panels, columns, strict=True):
        bars(panel, names, values, errors=errors, title=title)
        if panel is not panels[0]:
            panel.set_yticklabels([])
    return figure


def _histogram(panel: Any, values: Sequence[int], what: str, unit: str) -> None:
    if values:
        step = -(-(max(values) - min(values) + 1) // 40)  # whole tokens, so that all bins hold equally many lengths
        edges = [edge - 0.5 for edge in range(min(values), max(values) + step + 1, step)]
        panel.hist(values, bins=edges, color=BLUE)
    panel.set_xlabel(unit, fontsize=8)
    panel.set_ylabel(what, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _intervals(scores: Sequence[dict[str, float]], key: str) -> list[list[float]] | None:
    """[2, bars] distances to the ends of the intervals; None where there are none."""
    if any(f"{key}_low" not in s for s in scores):
        return None
    low = [max(0.0, s[key] - s[f"{key}_low"]) for s in scores]
    return [low, [max(0.0, s[f"{key}_high"] - s[key]) for s in scores]]
