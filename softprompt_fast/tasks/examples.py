"""Rows of data: where they come from, their splits, their digest, and which of them can be used."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Examples as Examples
from .rows import choose, places
from .task import Task
from .values import is_missing, label_name, matching_label

logger = logging.getLogger("softprompt_fast")


def split_rows(rows: Examples, held_out: float | int, seed: int = 0) -> tuple[Examples, Examples]:
    """Shuffles rows with a seed and holds out a share (below 1) or a number of them; returns the others and those."""
    count = round(len(rows) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(rows):
        raise ValueError(f"`held_out` must leave rows on both sides of {len(rows)}, got {held_out}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return choose(rows, order[count:]), choose(rows, order[:count])


def digest(rows: Examples) -> str:
    """A short text that is equal for equal lists of rows."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_empty(task: Task, row: Mapping[str, Any]) -> bool:
    """Whether all columns that the template names are missing values."""
    return all(name in row and is_missing(row[name]) for name in task.columns)


def has_target(task: Task, row: Mapping[str, Any]) -> bool:
    """Whether a row holds a label that the task knows, or a response."""
    if is_missing(row.get(task.target_column)):
        return False
    return (
        task.kind == "generation"
        or matching_label(label_name(row[task.target_column], task.target_column), task.label_words) is not None
    )


def lacks(task: Task, row: Mapping[str, Any]) -> str | None:
    """What a row must have to be scored and lacks: "text", or the target's column. None: it has both.

    Raises:
        ValueError: no such column.
    """
    if is_empty(task, row):
        return "text"
    if task.target_column not in row:
        raise ValueError(f"no column {task.target_column!r} in the data, which has {list(row)}")
    return repr(task.target_column) if is_missing(row[task.target_column]) else None


def complete_rows(task: Task, rows: Examples) -> Examples:
    """Rows with text and a target. Others are left out, with a warning that says where they are and what they lack.

    Raises:
        ValueError: no row is left, or no such column.
    """
    return _kept(task, rows, [lacks(task, row) for row in rows])


def usable_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Rows that can be scored. Rows without text or a known label are left out, with a warning.

    Raises:
        ValueError: no row is left.
    """

    def lacks_here(row: Mapping[str, Any]) -> str | None:
        if is_empty(task, row):
            return "text"
        return None if has_target(task, row) else f"known {task.target_column}"

    return _kept(task, rows, [lacks_here(row) for row in rows])


def _kept(task: Task, rows: Sequence[Mapping[str, Any]], lacking: Sequence[str | None]) -> Examples:
    """The rows that lack nothing; warns about the others."""
    indices = [i for i, what in enumerate(lacking) if what is None]
    if len(indices) == len(rows):
        return choose(rows, indices)
    out = {
        what: [i for i, other in enumerate(lacking) if other == what]
        for what in dict.fromkeys(lacking)
        if what is not None
    }
    reasons = "; ".join(f"no {what} ({places(rows, which)})" for what, which in out.items())
    if not indices:
        raise ValueError(
            f"`rows` must hold rows with text and {task.target_column!r}, got none among {len(rows)}: {reasons}"
        )
    logger.warning("%d of %d rows are left out: %s", len(rows) - len(indices), len(rows), reasons)
    return choose(rows, indices)
