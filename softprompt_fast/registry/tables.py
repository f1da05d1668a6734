"""Versions and their differences as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.scores import describe_scores, main_score
from ..length_search.significance import ALPHA
from .difference import VersionDifference
from .history import Move
from .prompt_registry import PromptVersion
from .record import Record

SHOWN_TEXT = 160
"""Characters of a text in a table of rows."""


def print_versions(versions: Sequence[PromptVersion], console: Console) -> None:
    table = Table("version", "alias", "score", "tokens", "parent", "added", "by")
    for column in table.columns[:2]:
        column.no_wrap = True
    for version in versions:
        record = version.record
        table.add_row(
            str(version),
            ", ".join(version.aliases),
            _short_score(record),
            str(record.virtual_tokens),
            record.parent or "",
            record.added.replace("T", " ")[:16],
            escape(record.author),
        )
    console.print(table)


def print_history(moves: Sequence[Move], console: Console) -> None:
    for move in moves:
        before = "" if move.before is None else f" (before: {move.before})"
        forced = f", forced although {escape(move.forced)}" if move.forced else ""
        moved = f"{move.name}@{move.alias} is {move.after}{before}"
        console.print(
            f"{move.at}  {move.action}: {moved}, by {escape(move.author)}{forced}",
            highlight=False,
            soft_wrap=True,
        )


def print_version(version: PromptVersion, console: Console) -> None:
    record = version.record
    facts: dict[str, Any] = {
        "version": str(version),
        "aliases": ", ".join(version.aliases) or "none",
        "description": record.description or None,
        "scores": _score(record) or "none recorded",
        "without the prompt": describe_scores(record.scores_without_prompt) if record.scores_without_prompt else None,
        "base model": f"{record.base_model or 'unnamed'} ({record.base_fingerprint or 'no fingerprint'})",
        "method": f"{record.method}, {record.virtual_tokens} virtual tokens",
        "parent": record.parent or "none",
        "trained on": record.train_rows,
        "held-out rows": record.held_out_rows,
        "seed": record.seed,
        "added": f"{record.added} by {record.author}",
        "content hash": record.content_hash,
        "settings": ", ".join(f"{key} {value}" for key, value in record.settings.items() if value is not None) or None,
        "libraries": ", ".join(f"{key} {value}" for key, value in record.libraries.items()),
    }
    for key, value in facts.items():
        if value is not None:
            console.print(f"{key:<19} {escape(str(value))}", highlight=False, soft_wrap=True)


def print_difference(difference: VersionDifference, console: Console, *, shown_rows: int = 20) -> None:
    first, second = escape(difference.first), escape(difference.second)
    if difference.same_files:
        console.print(f"{first} and {second} hold the same files.", highlight=False)
    if difference.settings:
        console.print(_pairs("settings and facts", difference.settings, first, second))
    else:
        console.print("no setting differs", highlight=False)
    if difference.scores:
        console.print(_pairs("recorded scores", difference.scores, first, second))
        if difference.records[0].held_out_rows != difference.records[1].held_out_rows:
            console.print("The recorded scores are from different rows; --data compares them on the same ones.")
    distance = difference.distance
    if distance is None:
        console.print(f"distance of the prompts: none, {difference.incomparable}", highlight=False)
    else:
        console.print(
            f"cosine of the vectors: same places {distance.aligned_cosine:.3f}, best matching "
            f"{distance.matched_cosine:.3f}, means {distance.mean_cosine:.3f}",
            highlight=False,
        )
        if distance.relative_change is not None:
            console.print(
                f"length of the difference, relative to {first}: same places {distance.relative_change:.3f}, best "
                f"matching {distance.matched_change:.3f}",
                highlight=False,
            )
    if difference.rows:
        _print_rows(difference, console, shown_rows)


def _print_rows(difference: VersionDifference, console: Console, shown_rows: int) -> None:
    first, second = escape(difference.first), escape(difference.second)
    if difference.row_scores:
        console.print(_pairs(f"scores on {difference.rows} rows", difference.row_scores, first, second))
    test = difference.test
    if test is not None:
        direction = "worse" if test.worse_by > 0 else "better"
        interval = (
            "" if test.low is None or test.high is None else f", 95 % interval {-test.high:.4f} to {-test.low:.4f}"
        )
        better = "gains" if test.metric == "accuracy" else "lowers the loss by"
        console.print(
            f"{second} {better} {-test.worse_by:.4f}{interval} ({test.test}, p = {test.p_value:.2g}): "
            f"{'significantly ' + direction if test.p_value < ALPHA else 'no significant difference'}",
            highlight=False,
        )
    console.print(f"{len(difference.changed)} of {difference.rows} answers changed", highlight=False)
    if not difference.changed or not shown_rows:
        return
    table = Table("row", "text", "target", first, second)
    for row in difference.changed[:shown_rows]:
        text = row.text if len(row.text) <= SHOWN_TEXT else f"{row.text[:SHOWN_TEXT]}..."
        table.add_row(*(escape(value) for value in (row.place, text, row.target or "", row.first, row.second)))
    console.print(table)
    if len(difference.changed) > shown_rows:
        console.print(f"{len(difference.changed) - shown_rows} more; --show and --output show all", highlight=False)


def _pairs(title: str, pairs: dict[str, tuple[Any, Any]], first: str, second: str) -> Table:
    table = Table(title, first, second)
    for key, values in pairs.items():
        table.add_row(escape(key), *(escape(_value(value)) for value in values))
    return table


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _short_score(record: Record) -> str:
    scores = record.scores
    name = main_score(scores)
    if name is not None:
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
        return f"{name.replace('_', ' ')} {scores[name]:.3f}{interval}"
    return f"loss {scores['loss']:.4f}" if "loss" in scores else ""


def _score(record: Record) -> str:
    return describe_scores(record.scores) if record.scores else ""
