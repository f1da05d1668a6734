"""Prompt ensembles: one decision of several prompts on one text (Lester et al. 2021, arXiv 2104.08691, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

COMBINATIONS = ("mean_probability", "mean_logit", "majority")


def combine_members(labels: Sequence[str], logits: npt.NDArray[Any], how: str | None) -> dict[str, Any]:
    """The decision of an ensemble.

    Args:
        labels: names, of C labels.
        logits: [m, C], of m members; a constant added to a member's changes nothing.
        how: "mean_probability", "mean_logit", "majority" (ties go to the higher mean probability), or None for m = 1.

    Returns:
        ``prediction``, ``scores`` (they sum to 1; of the majority the shares of votes) and, unless `how` is None,
        ``agreement``: the share of members that alone decide as the ensemble.
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


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    result: npt.NDArray[Any] = powers / powers.sum(-1, keepdims=True)
    return result
