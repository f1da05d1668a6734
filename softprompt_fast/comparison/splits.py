"""The rows of the splits: which are used, and their files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.files import write_atomically
from ..tasks.examples import Examples, usable_rows
from ..tasks.task import Task
from ..tasks.values import plain

SPLITS = ("train", "validation", "test")


def write_splits(folder: Path, splits: Mapping[str, Examples], task: Task) -> str:
    """Writes the columns that the task reads, as jsonl; returns a digest of all of them."""
    digest = hashlib.sha256()
    columns = [*dict.fromkeys([*task.columns, task.target_column])]
    for name in SPLITS:
        lines = [json.dumps({c: plain(row.get(c)) for c in columns}, ensure_ascii=False) for row in splits[name]]
        text = "".join(line + "\n" for line in lines)
        write_atomically(folder / f"{name}.jsonl", text)
        digest.update(f"{name}\n{text}".encode())
    return digest.hexdigest()


def read_split(folder: str, name: str) -> Examples:
    text = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def clean_splits(
    task: Task, train: Examples, validation: Examples, test: Examples
) -> tuple[dict[str, Examples], dict[str, int]]:
    """Rows that can be scored. Texts that are also in the test rows leave the other splits, so that nothing leaks.

    Returns:
        The splits, and how many rows were left out for which reason.
    """
    splits, left_out = {}, {}
    for name, rows in zip(SPLITS, (train, validation, test), strict=True):
        if not rows:
            raise ValueError(f"`{name}` must hold rows, got none")
        splits[name] = usable_rows(task, rows)
        left_out[f"{name}: no text or no known {task.target_column}"] = len(rows) - len(splits[name])
    for name, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        seen = {task.text(row) for other in others for row in splits[other]}
        kept = [row for row in splits[name] if task.text(row) not in seen]
        left_out[f"{name}: text also stands in {' or '.join(others)}"] = len(splits[name]) - len(kept)
        splits[name] = kept
        if not kept:
            raise ValueError(f"`{name}` must hold texts that are not in {' or '.join(others)}, got none")
    return splits, {reason: count for reason, count in left_out.items() if count}


def truth(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """[rows], the labels or responses."""
    return [task.label(row) if task.kind == "classification" else task.target(row) for row in rows]


def label_counts(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Rows of each label; empty for generation tasks."""
    counts = Counter(truth(task, rows))
    return {label: counts[label] for label in task.labels}
