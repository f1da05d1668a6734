"""Labelled rows of data: their splits, their digest, and which of them can be used."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .task import Task

logger = logging.getLogger("softprompt_fast")

Examples = list[dict[str, Any]]
"""Rows of data; each maps columns to values."""


def split_rows(rows: Examples, held_out: float | int, seed: int = 0) -> tuple[Examples, Examples]:
    """Shuffles rows with a seed and holds out a share (below 1) or a number of them; returns the others and those."""
    count = round(len(rows) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(rows):
        raise ValueError(f"`held_out` must leave rows on both sides of {len(rows)}, got {held_out}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def digest(rows: Examples) -> str:
    """A short text that is equal for equal lists of rows."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_empty(task: Task, row: Mapping[str, Any]) -> bool:
    """Whether all columns that the template names are blank."""
    return all(name in row and (row[name] is None or not str(row[name]).strip()) for name in task.columns)


def has_target(task: Task, row: Mapping[str, Any]) -> bool:
    """Whether a row holds a label that the task knows, or a response."""
    value = row.get(task.target_column)
    return value is not None and (task.kind == "generation" or str(value) in task.label_words)


def usable_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Rows that can be scored. Rows without text or a known label are left out, with one log line.

    Raises:
        ValueError: no row is left.
    """
    usable = [dict(row) for row in rows if not is_empty(task, row) and has_target(task, row)]
    if not usable:
        raise ValueError(f"`rows` must hold rows with text and {task.target_column!r}, got none among {len(rows)}")
    if len(usable) < len(rows):
        logger.warning(
            "%d of %d rows are left out: no text, or no known %s",
            len(rows) - len(usable),
            len(rows),
            task.target_column,
        )
    return usable
