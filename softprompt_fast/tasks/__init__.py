"""What a prompt is for, and the data it is tuned on."""

from .examples import split_rows
from .tables import load_rows
from .task import Task, classification_task, generation_task

__all__ = [
    "Task",
    "classification_task",
    "generation_task",
    "load_rows",
    "split_rows",
]
