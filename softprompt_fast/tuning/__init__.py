"""Tuning a soft prompt from rows of data: the task, the data, the loop (transformers' Trainer), the scores.

Needs the extra ``train``.
"""

from ..task import Task
from .data import load_rows, split_rows
from .evaluation import evaluate, predict
from .models import load_base_model
from .run import TuningResult, tune

__all__ = ["Task", "TuningResult", "evaluate", "load_base_model", "load_rows", "predict", "split_rows", "tune"]
