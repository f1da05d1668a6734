"""How two versions of a prompt differ: their settings, scores and vectors, and their answers to rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.similarity import aligned_cosine, mean_cosine, token_cosines
from ..length_search.significance import Difference
from ..prompts.peft_files import WEIGHTS_FILE
from ..prompts.tensor_files import FACTORS, KEY
from ..tasks.examples import Examples
from ..tasks.task import Task
from .answers import Answered, answer_with_both, compare_answers
from .record import Record

NOT_SETTINGS = ("model", "prompt")
"""Fields of a task that are no part of how rows are read."""


@dataclass(frozen=True)
class Distance:
    """How far the vectors of two prompts are from each other. Cosines are 1 for equal directions."""

    mean_cosine: float
    """Of the prompts' mean vectors."""
    aligned_cosine: float
    """Mean over vectors at the same places, up to the shorter prompt's length."""
    matched_cosine: float
    """Mean over pairs of vectors, each vector of the shorter prompt with another one of the longer prompt, in the
    matching with the largest mean: it does not depend on the order of vectors."""
    relative_change: float | None
    """Length of the difference of the two matrices, divided by the first one's; None: they have different lengths."""
    matched_change: float | None
    """The same after the matching."""


@dataclass(frozen=True)
class ChangedAnswer:
    """A row that the two versions answer differently."""

    row: int
    """Its place among the rows, from 0."""
    place: str
    """Where it was read."""
    text: str
    """The columns that the task reads."""
    target: str | None
    """Its label or response; None: it has none."""
    first: str
    second: str


@dataclass(frozen=True)
class VersionDifference:
    """The result of :meth:`PromptRegistry.diff`."""

    first: str
    second: str
    records: tuple[Record, Record]
    same_files: bool
    """Whether the content hashes are equal."""
    settings: dict[str, tuple[Any, Any]]
    """Settings, fields of the task and other facts that differ: the first version's value and the second's."""
    scores: dict[str, tuple[Any, Any]]
    """All recorded held-out scores. They are comparable if both were held-out on the same rows."""
    distance: Distance | None
    """None: the prompts cannot be compared number by number; :attr:`incomparable` says why."""
    incomparable: str | None = None
    rows: int = 0
    """Rows that both answered."""
    row_scores: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Scores on the rows; empty without labels."""
    test: Difference | None = None
    """The paired test of the second version against the first; None without labels."""
    changed: tuple[ChangedAnswer, ...] = ()
    """The rows that they answer differently."""

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self) | {"test": None if self.test is None else self.test.to_json()}
        del facts["records"]
        return facts


def compare_versions(
    first: tuple[str, Path, Record],
    second: tuple[str, Path, Record],
    *,
    rows: Examples | None = None,
    model: str | None = None,
    **options: Any,
) -> VersionDifference:
    """Compares two prompts, each by what it is called, its folder and its record; see :meth:`PromptRegistry.diff`."""
    folders, records = (first[1], second[1]), (first[2], second[2])
    distance, reason = vector_distance(*folders)
    answered: Answered | None = None
    if rows is not None:
        answered = answer_with_both(folders, records, rows, model, **options)
    return VersionDifference(
        first=first[0],
        second=second[0],
        records=records,
        same_files=records[0].content_hash == records[1].content_hash,
        settings=_differing(*(_facts(folder, record) for folder, record in zip(folders, records, strict=True))),
        scores=_both(records[0].scores, records[1].scores),
        distance=distance,
        incomparable=reason,
        **({} if answered is None else _row_facts(answered)),
    )


def vector_distance(first: Path, second: Path) -> tuple[Distance | None, str | None]:
    """The distance of the prompts of two adapter folders, or why there is none."""
    (a, factors_a), (b, factors_b) = _vectors(first), _vectors(second)
    if a.shape[1] != b.shape[1]:
        return None, f"the vectors of one have {a.shape[1]} numbers, those of the other {b.shape[1]}"
    if factors_a or factors_b:
        return None, "a prompt with a token update also changes the vectors of the text"
    from scipy.optimize import linear_sum_assignment

    cosines = token_cosines(a, b)
    places_a, places_b = (torch.as_tensor(places) for places in linear_sum_assignment(cosines.numpy(), maximize=True))
    same_length = len(a) == len(b)
    return (
        Distance(
            mean_cosine(a, b),
            aligned_cosine(a, b),
            cosines[places_a, places_b].mean().item(),
            _change(a, b) if same_length else None,
            _change(a[places_a], b[places_b]) if same_length else None,
        ),
        None,
    )


def _vectors(folder: Path) -> tuple[Tensor, bool]:
    """[P, D], or [P, L * 2 * H' * E] of a deep prompt, and whether the prompt has a token update too."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS_FILE)
    return tensors[KEY].double(), set(FACTORS) <= set(tensors)


def _change(a: Tensor, b: Tensor) -> float:
    return ((b - a).norm() / a.norm().clamp(min=1e-30)).item()


def _facts(folder: Path, record: Record) -> dict[str, Any]:
    """Everything that can explain a difference, flat."""
    facts: dict[str, Any] = {
        "method": record.method,
        "virtual_tokens": record.virtual_tokens,
        "base_model": record.base_model,
        "base_fingerprint": record.base_fingerprint,
        "train_rows": record.train_rows,
        "held_out_rows": record.held_out_rows,
    }
    facts |= {f"settings.{key}": value for key, value in record.settings.items()}
    try:
        task = asdict(Task.load(folder))
    except FileNotFoundError:
        task = {}
    facts |= {f"task.{key}": value for key, value in task.items() if key not in NOT_SETTINGS}
    return facts | {f"libraries.{key}": value for key, value in record.libraries.items()}


def _differing(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: pair for key, pair in _both(first, second).items() if pair[0] != pair[1]}


def _both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (first.get(key), second.get(key)) for key in {**first, **second}}


def _row_facts(answered: Answered) -> dict[str, Any]:
    return {
        "rows": len(answered.rows),
        "row_scores": _both(*answered.scores) if answered.scores else {},
        "test": compare_answers(answered),
        "changed": tuple(ChangedAnswer(*values) for values in answered.changed()),
    }
