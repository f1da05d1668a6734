"""Analyses, interpretations, pruning and transfer as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .interpretation import Interpretation
from .pruning import Pruned
from .results import Analysis
from .transfer import Similarity


def print_analysis(analysis: Analysis, console: Console) -> None:
    lengths = Table("tokens", "mean", *analysis.text.quantiles, title="Lengths")
    for name, values in (("text", analysis.text), ("answer", analysis.target)):
        lengths.add_row(name, f"{values.mean:.1f}", *map(str, values.quantiles.values()))
    console.print(lengths)
    limit = (
        "no fixed limit" if analysis.context is None else f"{analysis.context} ({analysis.over_context:.2%} do not fit)"
    )
    console.print(
        f"max_length {analysis.max_length} cuts {analysis.cut_by_max_length:.2%} of the texts; model's context: {limit}"
    )
    if analysis.classes:
        total = max(1, sum(analysis.classes.values()))
        classes = Table("label", "rows", "share", "word", "tokens", "said without a prompt", title="Classes")
        for label, count in analysis.classes.items():
            word = analysis.label_words[label]
            said = analysis.zero_shot_answers.get(label)
            classes.add_row(
                escape(label),
                str(count),
                f"{count / total:.1%}",
                escape(repr(word.word)),
                f"{len(word.ids)}: {escape(' '.join(map(repr, word.tokens)))}",
                "" if said is None else str(said),
            )
        console.print(classes)
    repeats = analysis.duplicates
    rows = Table("rows", "exact", "differing in case, punctuation, spaces", title="Repeats")
    rows.add_row(f"training ({analysis.train_rows}) repeating an earlier text", str(repeats.exact), str(repeats.near))
    rows.add_row(
        f"held out ({analysis.held_out_rows}) that are also in training",
        str(repeats.leaks_exact),
        str(repeats.leaks_near),
    )
    console.print(rows)
    if analysis.majority is not None:
        console.print(f"always {analysis.majority['label']!r}: {_scores(analysis.majority)}")
    if analysis.zero_shot is not None:
        console.print(f"model without a prompt: {_scores(analysis.zero_shot)}")
    recipe = Table("setting", "suggested", "because", title="Recipe")
    for name, choice in analysis.recipe.choices.items():
        recipe.add_row(name, escape(str(choice.value)), escape(choice.reason))
    console.print(recipe)
    for warning in analysis.recipe.warnings:
        console.print(f"[bold yellow]warning:[/bold yellow] {escape(warning)}", highlight=False)
    console.print(
        f"softprompt-fast train {analysis.recipe.options()} ...", highlight=False, markup=False, soft_wrap=True
    )


def print_interpretation(interpretation: Interpretation, console: Console) -> None:
    console.print(interpretation.caveat, style="bold yellow", highlight=False)
    norms = ", ".join(f"{name} {value:.2f}" for name, value in interpretation.vocabulary_norms.items())
    console.print(f"norms of the vocabulary: {norms}")
    for name, reading in interpretation.prompts.items():
        dropped = (
            interpretation.ablation
            if interpretation.ablation is not None and interpretation.ablation.prompt == name
            else None
        )
        columns = ["", "norm", "larger than", "nearest by cosine", "nearest by distance"]
        table = Table(*columns, *(["without it: loss", "accuracy"] if dropped else []), title=escape(name))
        for i, norm in enumerate(reading.norms):
            line = [str(i), f"{norm:.2f}", f"{reading.norm_ranks[i]:.0%}"]
            line.append(escape(" ".join(f"{n.token!r} {n.value:.2f}" for n in reading.cosine[i])))
            line.append(escape(" ".join(f"{n.token!r} {n.value:.2f}" for n in reading.euclidean[i])))
            if dropped is not None:
                line.append(f"{dropped.loss_change[i]:+.4f} +-{dropped.loss_change_half_width[i]:.4f}")
                line.append("" if dropped.accuracy_change is None else f"{dropped.accuracy_change[i]:+.3f}")
            table.add_row(*line)
        console.print(table)
        if dropped is not None:
            accuracy = "" if dropped.accuracy is None else f", accuracy {dropped.accuracy:.3f}"
            console.print(f"whole prompt on {dropped.rows} rows: loss {dropped.loss:.4f}{accuracy}")
    names = list(interpretation.prompts)
    if len(names) > 1:
        for title, values in (
            ("cosine of mean vectors", interpretation.mean_cosine),
            ("mean cosine place by place", interpretation.aligned_cosine),
        ):
            table = Table("", *map(escape, names), title=f"Between prompts: {title}")
            for name, row in zip(names, values, strict=True):
                table.add_row(escape(name), *(f"{value:.3f}" for value in row))
            console.print(table)


def print_pruned(pruned: Pruned, console: Console) -> None:
    count = len(pruned.loss_changes)
    console.print(f"{count} vectors, {len(pruned.kept)} kept: {pruned.kept}; removed in this order: {pruned.removed}")
    if pruned.zeroed_pieces:
        console.print(f"{pruned.zeroed_pieces} pieces of the kept vectors set to zero")
    table = Table("rows", "before", "after", title="Scores")
    for name, part in (("selection (used to choose: too good)", pruned.selection), ("other rows", pruned.held_out)):
        table.add_row(f"{name}, {part['before']['rows']:.0f}", _scores(part["before"]), _scores(part["after"]))
    console.print(table)


def print_similar(sources: Sequence[Similarity], console: Console) -> None:
    table = Table("", "prompt", "on the rows", "cosine of means", "mean cosine", title="Sources, the best first")
    for place, source in enumerate(sources, 1):
        numbers = [source.mean_cosine, source.pairwise_cosine]
        table.add_row(
            str(place),
            escape(source.name),
            "" if source.scores is None else _scores(source.scores),
            *("" if number is None else f"{number:.3f}" for number in numbers),
        )
    console.print(table)


def _scores(scores: dict[str, Any]) -> str:
    parts = []
    for key in ("accuracy", "loss", "perplexity"):
        if key in scores:
            interval = ""
            if f"{key}_low" in scores:
                interval = f" ({scores[f'{key}_low']:.3f} to {scores[f'{key}_high']:.3f})"
            parts.append(f"{key} {scores[key]:.3f}{interval}")
    return ", ".join(parts)
