"""The input and the output of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.scores import RowScores
from ..tasks.examples import Examples
from ..tasks.task import Task
from .settings import Job


@dataclass
class Work:
    """A job with its model and rows."""

    job: Job
    task: Task
    model: Any
    tokenizer: Any
    splits: dict[str, Examples]

    @property
    def options(self) -> dict[str, Any]:
        return self.job.options

    @property
    def artifacts(self) -> Path:
        return Path(self.job.artifacts)


@dataclass
class Ready:
    """A method that is ready to score rows."""

    score: Callable[[Examples], RowScores]
    prefix_tokens: float = 0.0
    trainable_parameters: int = 0
    stored_bytes: int = 0
    """Bytes on disk that one more task adds to the frozen model."""
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    uses_head: bool = True
    """Whether a prediction needs the model's logits."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Other facts for a reader of the report."""


class NotApplicable(Exception):
    """The method does not exist for this kind of task. Not a failure."""
