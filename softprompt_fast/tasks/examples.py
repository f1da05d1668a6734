"""Rows of data: where they come from, their splits, their digest, and which of them can be used."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .containers import as_rows
from .rows import Examples as Examples
from .rows import choose, place, places
from .task import Task
from .values import is_missing, label_name, matching_label, messages_of

logger = logging.getLogger("softprompt_fast")

UNREADABLE = "readable text"
"""What a row lacks whose text, label or response is a list, a mapping or no valid Unicode."""


def split_rows(rows: Examples, held_out: float | int, seed: int = 0) -> tuple[Examples, Examples]:
    """Shuffles rows with a seed and holds out a share (below 1) or a number of them; returns the others and those."""
    rows = as_rows(rows)
    fits = 0 < held_out < max(1, len(rows))
    count = (round(len(rows) * held_out) if held_out < 1 else int(held_out)) if fits else 0
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
    if task.kind == "answering":  # a question without a context has no answer, and no context answers nothing
        return any(name in row and is_missing(row[name]) for name in task.columns)
    if task.kind == "tagging" and task.columns[0] in row and isinstance(row[task.columns[0]], (list, tuple)):
        return not row[task.columns[0]]
    return all(name in row and is_missing(row[name]) for name in task.columns)


def unreadable(task: Task, row: Mapping[str, Any]) -> str | None:
    """Why the text, the label or the response of a row cannot be read; None: it can, or it is missing.

    Raises:
        ValueError: a value that is not one label.
    """
    target = task.target_column
    if task.kind in ("tagging", "answering"):
        try:
            _ = task.tags(row) if task.kind == "tagging" else task.answers(row)
        except ValueError as error:
            return str(error)
        return None
    if task.kind == "classification" and not isinstance(row.get(target), str):
        label_name(row.get(target), target)
    for column in dict.fromkeys((*task.columns, target)):
        value = row.get(column)
        if task.chat is not None and messages_of(value) is not None:
            continue  # it is rendered when the chat template is known
        try:
            task.cell(value, column)
        except ValueError as error:
            return str(error)
    return None


def has_target(task: Task, row: Mapping[str, Any]) -> bool:
    """Whether a row holds a label that the task knows, or a response."""
    if is_missing(row.get(task.target_column)):
        return False
    if task.kind == "generation":
        return True
    if task.kind in ("tagging", "answering"):
        return unreadable(task, row) is None
    try:
        name = label_name(row[task.target_column], task.target_column)
    except ValueError:
        if isinstance(row[task.target_column], str):
            return False
        raise
    return matching_label(name, task.labels) is not None


def lacks(task: Task, row: Mapping[str, Any]) -> str | None:
    """What a row must have to be scored and lacks: "text", the target's column, or "readable text" and why.

    Returns:
        None for a row that lacks nothing.

    Raises:
        ValueError: no such column, or a value that is not one label.
    """
    if is_empty(task, row):
        return "text"
    if task.target_column not in row:
        raise ValueError(f"no column {task.target_column!r} in the data, which has {list(row)}")
    if is_missing(row[task.target_column]):
        return repr(task.target_column)
    reason = unreadable(task, row)
    return None if reason is None else f"{UNREADABLE}: {reason}"


def check_complete(task: Task, rows: Sequence[Mapping[str, Any]], argument: str) -> None:
    """Refuses rows without text or target.

    Args:
        argument: the name of the rows, for the message.

    Raises:
        ValueError: how many rows lack one, the first of them, and what to do.
    """
    lacking = {i: what for i, row in enumerate(rows) if (what := lacks(task, row)) is not None}
    if lacking:
        first = min(lacking)
        raise ValueError(
            f"`{argument}` must hold text and {task.target_column!r} in each row of {task.prompt!r}, "
            f"{len(lacking)} of {len(rows)} lack one: {place(rows, first)} has no {lacking[first]}; "
            "tasks.complete_rows(task, rows) leaves such rows out"
        )


def complete_rows(task: Task, rows: Examples) -> Examples:
    """Rows with text and a target. Others are left out, with a warning that says where they are and what they lack.

    Raises:
        ValueError: no row is left, or no such column.
    """
    rows = as_rows(rows)
    return _kept(task, rows, [lacks(task, row) for row in rows])


def usable_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Rows that can be scored. Rows without text or a known label are left out, with a warning.

    Raises:
        ValueError: no row is left.
    """

    def lacks_here(row: Mapping[str, Any]) -> str | None:
        if is_empty(task, row):
            return "text"
        if not is_missing(row.get(task.target_column)) and (reason := unreadable(task, row)) is not None:
            return f"{UNREADABLE}: {reason}"
        return None if has_target(task, row) else f"known {task.target_column}"

    return _kept(task, rows, [lacks_here(row) for row in rows])


def _kept(task: Task, rows: Sequence[Mapping[str, Any]], lacking: Sequence[str | None]) -> Examples:
    """The rows that lack nothing; warns about the others."""
    indices = [i for i, what in enumerate(lacking) if what is None]
    if len(indices) == len(rows):
        return choose(rows, indices)
    out: dict[str, list[int]] = {}
    whys: dict[str, str] = {}
    for i, lack in enumerate(lacking):
        if lack is not None:
            what, _, why = lack.partition(": ") if lack.startswith(UNREADABLE) else (lack, "", "")
            out.setdefault(what, []).append(i)
            whys.setdefault(what, f": {why}" if why else "")
    reasons = "; ".join(f"no {what} ({places(rows, which)}{whys[what]})" for what, which in out.items())
    if not indices:
        raise ValueError(
            f"`rows` must hold rows with text and {task.target_column!r}, got none among {len(rows)}: {reasons}"
        )
    logger.warning("%d of %d rows are left out: %s", len(rows) - len(indices), len(rows), reasons)
    return choose(rows, indices)
