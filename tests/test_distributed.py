"""Two processes give the gradient of one on the same global batch; accumulated batches that of a large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.peft_format import read_prompt
from softprompt_fast.task import classification_task
from softprompt_fast.tuning import tune

WORKER = Path(__file__).parent / "distributed_worker.py"


def on_two_processes(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    assert finished.stdout.count("equal") == 2


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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind: str) -> None:
    on_two_processes(kind)


def test_the_trainer_on_two_processes_equals_one(tmp_path: Path) -> None:
    on_two_processes("trainer", str(tmp_path / "two"))
    expected = tune_tiny(tmp_path / "one", batch_size=8)
    found = read_prompt(tmp_path / "two" / "p")[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, tune_tiny(tmp_path / "half", batch_size=4), atol=1e-4)  # it would notice


def test_gradient_accumulation_equals_a_large_batch(tmp_path: Path) -> None:
    large = tune_tiny(tmp_path / "large", batch_size=8)
    accumulated = tune_tiny(tmp_path / "accumulated", batch_size=4, gradient_accumulation_steps=2)
    assert torch.allclose(large, accumulated, atol=1e-5)
