"""PEFT's multitask prompts (arXiv 2303.02861): one adapter folder that holds a prompt for each of several tasks.

All tasks share ``prompt_embeddings [P, D]``. A task's prompt is its product, element by element, with that task's
``prefix_task_cols [P, r] @ prefix_task_rows [r, D]``. PEFT numbers the tasks and does not name them. Here a task's
prompt is given as the folder and the number, ``folder#2``.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from torch import Tensor

from .tensor_files import KEY, read_tensor

MULTITASK = "MULTITASK_PROMPT_TUNING"
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"
MAX_TASKS = 10_000
TASK_PATH = re.compile(r"(.+)#(\d{1,6})")


def split_task(path: PathLike[str] | str) -> tuple[Path, int | None]:
    """Folder and number of ``folder#2``; of any other path the path itself and None. An existing path is no task."""
    path = Path(path)
    match = TASK_PATH.fullmatch(path.name)
    if match is None or path.exists():
        return path, None
    return path.with_name(match[1]), int(match[2])


def task_paths(folder: Path, tasks: int) -> list[Path]:
    """The paths that name the tasks of a folder; the folder itself if it has one.

    Raises:
        ValueError: more tasks than can be listed.
    """
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"{folder}: `num_tasks` must be 1 to {MAX_TASKS}, got {tasks}")
    return [folder] if tasks == 1 else [folder.with_name(f"{folder.name}#{task}") for task in range(tasks)]


def read_task_prompt(folder: Path, weights: Path, task: int | None) -> Tensor:
    """[P, D], the prompt of a task.

    Args:
        weights: the folder's safetensors file.
        task: None: the only task.

    Raises:
        ValueError: no such task, none is named and there are several, or tensors that do not fit each other.
    """
    shared, columns, rows = (read_tensor(weights, key) for key in (KEY, COLUMNS, ROWS))
    fits = shared.dim() == 2 and columns.dim() == rows.dim() == 3 and len(columns) == len(rows) > 0
    if not fits or [*columns.shape[1:]] != [len(shared), rows.shape[1]] or rows.shape[2] != shared.shape[1]:
        raise ValueError(
            f"{weights}: `{KEY}`, `{COLUMNS}` and `{ROWS}` must have shapes [P, D], [tasks, P, r] and [tasks, r, D], "
            f"got {list(shared.shape)}, {list(columns.shape)} and {list(rows.shape)}"
        )
    if task is None and len(columns) > 1:
        raise ValueError(f"{folder} holds the prompts of {_tasks(folder, len(columns))}; one of them must be named")
    if task is not None and task >= len(columns):
        raise ValueError(f"{folder}#{task} must be a task of the folder, which holds {_tasks(folder, len(columns))}")
    return shared * (columns[task or 0] @ rows[task or 0])


def _tasks(folder: Path, tasks: int) -> str:
    return "one task, 0" if tasks == 1 else f"{tasks} tasks, {folder}#0 to {folder}#{tasks - 1}"
