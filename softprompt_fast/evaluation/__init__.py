"""Predictions, scores and statistics."""

from .ensembles import evaluate_ensemble
from .predictions import evaluate, predict
from .prompt_scoring import score_prompts
from .scores import RowScores

__all__ = [
    "RowScores",
    "evaluate",
    "evaluate_ensemble",
    "predict",
    "score_prompts",
]
