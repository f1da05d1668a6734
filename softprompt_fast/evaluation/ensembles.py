"""Prompt ensembles: one decision of several prompts on one text (Lester et al. 2021, arXiv 2104.08691, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base.modules import evaluating
from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import Examples
from ..tasks.task import Task
from .likelihood import ModelBackend, encode_rows, label_table
from .predictions import prompt_name
from .scores import RowScores

COMBINATIONS = ("mean_probability", "mean_logit", "majority")
SMALLEST = 1e-30
"""Probability that a loss counts for a label without any vote; its logarithm would be infinite."""


def combine_members(labels: Sequence[str], logits: npt.NDArray[Any], how: str | None) -> dict[str, Any]:
    """The decision of an ensemble.

    Args:
        labels: names of the C labels.
        logits: [m, C], of m members; a constant added to a member's logits changes nothing.
        how: "mean_probability", "mean_logit", "majority" (ties go to the higher mean probability), or None for m = 1.

    Returns:
        ``prediction``, ``scores`` (they sum to 1; for a majority, the shares of votes) and, unless `how` is None,
        ``agreement``: the share of members whose own decision is the ensemble's.
    """
    probabilities = _softmax(logits)
    mean = probabilities.mean(0)
    votes = np.bincount(logits.argmax(1), minlength=len(labels)) / len(logits)
    if how == "mean_logit":
        scores = _softmax((logits - logits.mean(1, keepdims=True)).mean(0))
    elif how == "majority":
        scores = votes
    else:
        scores = mean
    best = int(np.lexsort((mean, scores))[-1])
    result: dict[str, Any] = {
        "prediction": labels[best],
        "scores": {label: float(score) for label, score in zip(labels, scores, strict=True)},
    }
    if how is not None:
        result["agreement"] = float(votes[best])
    return result


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
    """Scores of several prompts' common decision on labelled rows, with the keys of :func:`evaluate`."""
    encoded = encode_rows(task, rows, tokenizer, encoder_decoder=is_encoder_decoder(model.base_model))
    if encoded.truth is None:
        raise ValueError("`task` must be a classification task: members vote for labels, got a generation task")
    with evaluating(model):
        members = [
            label_table(ModelBackend(model, prompt_name(model, task, name)), encoded.texts, encoded.words, batch_size)
            for name in prompts
        ]
    logits = torch.stack(members, 1).numpy()  # [rows, m, C]
    decisions = [combine_members(task.labels, row, combine) for row in logits]
    predicted = torch.tensor([task.labels.index(decision["prediction"]) for decision in decisions])
    probabilities = torch.tensor([list(decision["scores"].values()) for decision in decisions], dtype=torch.float64)
    scores = RowScores.of_labels(probabilities.clamp(min=SMALLEST).log(), encoded.truth)
    # A tie of votes is decided by the mean probability, which the shares of votes do not show.
    scores.predicted, scores.correct = predicted, predicted == encoded.truth
    return scores.metrics(encoded.truth)


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    result: npt.NDArray[Any] = powers / powers.sum(-1, keepdims=True)
    return result
