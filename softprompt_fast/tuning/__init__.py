"""Tunes soft prompts on rows of data, with transformers' Trainer.

Needs the extra ``train``.
"""

from ..evaluation.ensembles import evaluate_ensemble
from ..evaluation.predictions import evaluate, predict
from ..hf.loading import load_base_model
from ..tasks.examples import split_rows
from ..tasks.tables import load_rows
from ..tasks.task import Task
from .ensemble import EnsembleResult, tune_ensemble
from .job import TuningJob, TuningResult
from .run import tune, tune_tasks
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
