"""Scores of ensembles: one decision of several prompts on each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import Examples
from ..tasks.task import Task
from .combine import combine_members
from .predictions import classification_scores, predict


def evaluate_ensemble(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    prompts: Sequence[str],
    *,
    combine: str = "mean_probability",
    batch_size: int = 32,
) -> dict[str, float]:
    """Scores of several prompts' common decision on labelled rows, as ``evaluate`` gives them for one."""
    each = [predict(model, tokenizer, task, rows, batch_size=batch_size, prompt=name) for name in prompts]
    logits = np.log(
        np.asarray([[[p["scores"][label] for label in task.labels] for p in one] for one in each]).clip(1e-30)
    )  # [m, rows, C]
    decisions = [combine_members(task.labels, logits[:, i], combine) for i in range(len(rows))]
    return classification_scores(task, rows, decisions)
