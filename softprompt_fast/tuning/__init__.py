"""Tuning a soft prompt from rows of data: the task, the data, the loop (transformers' Trainer), the scores.

Needs the extra ``train``.
"""

from ..task import Task
from .data import load_rows, split_rows
from .ensemble import EnsembleResult, evaluate_ensemble, tune_ensemble
from .evaluation import evaluate, predict
from .models import load_base_model
from .run import TuningJob, TuningResult, tune, tune_tasks
from .settings import TuningSettings

__all__ = [
    "EnsembleResult",
    "Task",
    "TuningJob",
    "TuningResult",
    "TuningSettings",
    "evaluate",
    "evaluate_ensemble",
    "load_base_model",
    "load_rows",
    "predict",
    "split_rows",
    "tune",
    "tune_ensemble",
    "tune_tasks",
]
