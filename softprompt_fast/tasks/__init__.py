"""Tasks, and the data that prompts are tuned on."""

from .examples import complete_rows, split_rows
from .head import Head
from .head_tasks import answering_task, sequence_task, tagging_task
from .tables import load_rows
from .task import Task, classification_task, generation_task

__all__ = [
    "Head",
    "Task",
    "answering_task",
    "classification_task",
    "complete_rows",
    "generation_task",
    "load_rows",
    "sequence_task",
    "split_rows",
    "tagging_task",
]
