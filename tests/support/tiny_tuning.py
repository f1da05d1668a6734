"""A tuning run of two steps, the same in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import softprompt_fast as spf
from softprompt_fast.tasks.task import classification_task
from softprompt_fast.tuning.run import tune
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer


def tune_tiny(output: Path, **options: Any) -> torch.Tensor:
    """Two steps over eight rows, of which the first warms up; the prompt [4, 32] afterwards."""
    tuned = spf.SoftPromptModel(build("llama"))
    task = classification_task(reviews(), prompt="p")
    tune(
        tuned,
        tiny_tokenizer(),
        task,
        reviews(8),
        reviews(4),
        output,
        steps=2,
        eval_every=2,
        num_virtual_tokens=4,
        **options,
    )
    assert tuned.execution_report().execution == "shared"
    return tuned.prompts["p"].detach()
