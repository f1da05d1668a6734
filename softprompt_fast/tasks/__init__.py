"""Tasks, and the data that prompts are tuned on."""

from .examples import complete_rows, split_rows
from .tables import load_rows
from .task import Task, classification_task, generation_task

__all__ = [
    "Task",
    "classification_task",
    "complete_rows",
    "generation_task",
    "load_rows",
    "split_rows",
]
