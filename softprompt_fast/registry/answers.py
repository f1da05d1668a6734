"""The answers of two prompts to the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.modules import evaluating
from ..evaluation.likelihood import ModelBackend, encode_rows, score_rows
from ..evaluation.predictions import predict
from ..evaluation.scores import RowScores
from ..hf.architecture import is_encoder_decoder
from ..hf.loading import load_base_model
from ..length_search.significance import Difference, compare_scores
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.peft_files import is_deep
from ..tasks.examples import Examples, complete_rows, is_empty
from ..tasks.rows import choose, place
from ..tasks.task import Task
from ..tasks.values import is_missing, label_name, text_of
from .record import Record


@dataclass(frozen=True)
class Answered:
    """Rows, and what two prompts answer to each."""

    rows: Examples
    tasks: tuple[Task, Task]
    answers: tuple[list[str], list[str]]
    scores: tuple[dict[str, float], dict[str, float]] | None
    """None: the rows have no labels."""
    row_scores: tuple[RowScores, RowScores] | None

    def changed(self) -> Iterator[tuple[int, str, str, str | None, str, str]]:
        """The rows with different answers: number, place, text, target, and the two answers."""
        task = self.tasks[0]
        for i, (first, second) in enumerate(zip(*self.answers, strict=True)):
            if first != second:
                text = " | ".join(str(self.rows[i][column]) for column in task.columns)
                yield i, place(self.rows, i), text, _target(task, self.rows[i]), first, second


def answer_with_both(
    folders: Sequence[Path],
    records: Sequence[Record],
    rows: Examples,
    model: str | None,
    *,
    batch_size: int = 32,
    dtype: str = "auto",
    device: str | None = None,
    scores_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Answered:
    """Lets two prompts answer rows on one base model.

    If no row has a label, nothing is scored; if some have, the others are left out with a warning.

    Args:
        scores_only: do not let them generate text. The rows must have labels.
        progress: called with the number of rows that a prompt has scored or answered.

    Raises:
        ValueError: no row with text, no labels where they are needed, tasks of different kinds, no base model is known,
            or a prompt's base model is another one.
    """
    tasks = (Task.load(folders[0]), Task.load(folders[1]))
    if tasks[0].kind != tasks[1].kind:
        raise ValueError(f"the prompts must have tasks of one kind, got {tasks[0].kind} and {tasks[1].kind}")
    if heads := [task.head.name for task in tasks if task.head is not None]:
        raise ValueError(f"the answers of prompts cannot be compared with data if they have a head, got {heads[0]}")
    labelled = any(not is_missing(row.get(tasks[0].target_column)) for row in rows)
    if scores_only and not labelled:
        raise ValueError(f"`rows` must hold labels, which the promotion is decided by, got none in {len(rows)} rows")
    if labelled:
        for task in tasks:
            rows = complete_rows(task, rows)
    else:
        rows = choose(rows, [i for i, row in enumerate(rows) if not is_empty(tasks[0], row)])
    if not rows:
        raise ValueError("`rows` must hold at least one row with text, got none")
    name = model or records[0].base_model or records[1].base_model
    if name is None:
        raise ValueError("`model` (--model) must be given, because the versions do not say which model they are for")
    base, tokenizer = load_base_model(name, dtype, device)
    answers, scores, row_scores = [], [], []
    for folder, task in zip(folders, tasks, strict=True):
        tuned = (DeepPromptModel if is_deep(folder) else SoftPromptModel)(base)
        tuned.load_prompt(folder, task.prompt)
        generates = task.kind == "generation" and not scores_only
        if labelled:
            encoded = encode_rows(task, rows, tokenizer, encoder_decoder=is_encoder_decoder(base))
            with evaluating(tuned):
                counted = None if generates else progress  # a row counts once
                own = score_rows(ModelBackend(tuned, task.prompt), encoded, batch_size, counted)
            row_scores.append(own)
            scores.append(own.metrics(encoded.truth))
        if labelled and task.kind == "classification":
            assert row_scores[-1].predicted is not None
            answers.append([task.labels[i] for i in row_scores[-1].predicted.tolist()])
        elif generates or not labelled:
            predicted = predict(tuned, tokenizer, task, rows, batch_size=batch_size, progress=progress)
            answers.append([str(one["prediction"]) for one in predicted])
    return Answered(
        rows,
        tasks,
        (answers[0], answers[1]) if answers else ([], []),
        (scores[0], scores[1]) if labelled else None,
        (row_scores[0], row_scores[1]) if labelled else None,
    )


def compare_answers(answered: Answered) -> Difference | None:
    """The paired test of the second prompt against the first; None without labels."""
    if answered.row_scores is None:
        return None
    first, second = answered.row_scores
    by = "accuracy" if answered.tasks[0].kind == "classification" else "loss"
    return compare_scores(second, first, by)


def _target(task: Task, row: dict[str, Any]) -> str | None:
    value = row.get(task.target_column)
    if is_missing(value):
        return None
    return (
        label_name(value, task.target_column) if task.kind == "classification" else text_of(value, task.target_column)
    )
