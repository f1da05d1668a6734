"""The input and the result of a tuning run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..tasks.containers import as_rows
from ..tasks.examples import Examples
from ..tasks.task import Task
from .settings import TuningSettings


@dataclass
class TuningJob:
    """One prompt to tune."""

    task: Task
    """``task.prompt`` is the prompt's name."""
    train_rows: Examples
    held_out_rows: Examples
    settings: TuningSettings | None = None
    """Settings of the prompt's initial values; None: the run's settings."""
    scorer: Callable[[str | None], dict[str, float]] | None = None
    """Replaces :func:`evaluate`: gives the held-out scores of the prompt with this name; None: without a prompt."""

    def __post_init__(self) -> None:
        self.train_rows = as_rows(self.train_rows, "train_rows")
        self.held_out_rows = as_rows(self.held_out_rows, "held_out_rows")


@dataclass
class TuningResult:
    """The result of a run, for one prompt."""

    folder: Path
    """The prompt's own folder."""
    before: dict[str, float]
    """Held-out scores of the model without a prompt."""
    after: dict[str, float]
    """Held-out scores with the best prompt; it was chosen by them, so they are a little too good."""
    tuning_seconds: float
    """Time spent in the loop, its evaluations included."""
    evaluation_seconds: float
    """Time of those evaluations."""
    steps: int
    best_step: int
    interrupted: bool
    trainable_parameters: int
    """Numbers trained for this prompt, in the form it had: a shared part counts for each prompt."""
    history: list[dict[str, float]]
    """``step``, ``seconds`` of tuning without evaluations, and scores, of each evaluation."""
