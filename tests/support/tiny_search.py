"""A search over the tiny task of ``tiny_reviews``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

import softprompt_fast as spf
from softprompt_fast.length_search.result import SearchResult
from softprompt_fast.length_search.run import search
from softprompt_fast.tasks.task import Task, classification_task
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

TASK = classification_task(reviews(), prompt="p")
FAST: dict[str, Any] = {"steps": 40, "batch_size": 8, "learning_rate": 0.1, "lengths": [1, 2, 3, 4]}


def quiet() -> Console:
    return Console(quiet=True)


def searched(output: Path, task: Task = TASK, **options: Any) -> SearchResult:
    model = options.pop("model", None) or spf.SoftPromptModel(build("llama"))
    rows, held_out = options.pop("rows", None) or reviews(64), options.pop("held_out", None) or reviews(40)
    return search(model, tiny_tokenizer(), task, rows, held_out, output, **(FAST | {"console": quiet()} | options))
