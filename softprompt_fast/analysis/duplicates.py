"""Texts that appear more than once: repeats, contradictions, and leaks into the held-out rows."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks.examples import has_target
from ..tasks.task import Task
from ..tasks.values import is_missing

EXAMPLES = 5


@dataclass
class Duplicates:
    """Counts of rows, and a few of their texts."""

    exact: int
    """Rows that repeat an earlier row's text exactly."""
    near: int
    """Rows that repeat an earlier row's normalised text, not counting ``exact``."""
    conflicts: int
    """Rows whose normalised text has several labels; 0 for generation tasks, where answers may differ."""
    leaks_exact: int
    """Held-out rows whose text is in the training data."""
    leaks_near: int
    """Held-out rows whose normalised text is in the training data, not counting ``leaks_exact``."""
    conflict_examples: list[str]
    leak_examples: list[str]


def normalise(text: str) -> str:
    """Removes differences of case, accent encoding, punctuation and spaces. A text with nothing else is kept."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip() or folded.strip()


def row_text(task: Task, row: Mapping[str, Any]) -> str:
    """The columns that the template names, without the template."""
    return "\n".join("" if is_missing(row[name]) else str(row[name]) for name in task.columns)


def find_duplicates(
    task: Task, train_rows: Sequence[Mapping[str, Any]], held_out_rows: Sequence[Mapping[str, Any]]
) -> Duplicates:
    """Counts repeats and contradictions among the training rows, and held-out rows that are also training rows."""
    texts: set[str] = set()
    labels: dict[str, set[str]] = {}
    of_label: dict[str, int] = {}
    exact = near = 0
    for row in train_rows:
        text = row_text(task, row)
        key = normalise(text)
        if text in texts:
            exact += 1
        elif key in labels:
            near += 1
        texts.add(text)
        known = labels.setdefault(key, set())
        if task.kind == "classification" and has_target(task, row):
            known.add(task.label(row))
            of_label[key] = of_label.get(key, 0) + 1
    contradictory = [key for key, known in labels.items() if len(known) > 1]
    held_out = [row_text(task, row) for row in held_out_rows]
    leaked = [text for text in held_out if text in texts]
    almost = [text for text in held_out if text not in texts and normalise(text) in labels]
    return Duplicates(
        exact,
        near,
        sum(of_label[key] for key in contradictory),
        len(leaked),
        len(almost),
        contradictory[:EXAMPLES],
        list(dict.fromkeys(leaked + almost))[:EXAMPLES],
    )
