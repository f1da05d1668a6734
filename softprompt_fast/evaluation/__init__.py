"""Predictions, scores and statistics."""

from .ensembles import evaluate_ensemble
from .predictions import evaluate, predict
from .scoring import RowScores, score_prompts

__all__ = [
    "RowScores",
    "evaluate",
    "evaluate_ensemble",
    "predict",
    "score_prompts",
]
