"""Two processes give the gradient of one on the same global batch; accumulated batches that of a large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_tuning import tune_tiny

from softprompt_fast.prompts.peft_files import read_prompt

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"


def on_two_processes(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    assert finished.stdout.count("equal") == 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind: str) -> None:
    on_two_processes(kind)


def test_the_trainer_on_two_processes_equals_one(tmp_path: Path) -> None:
    on_two_processes("trainer", str(tmp_path / "two"))
    expected = tune_tiny(tmp_path / "one", batch_size=8)
    tuned = read_prompt(tmp_path / "two" / "p")[0]
    assert torch.allclose(tuned, expected, atol=1e-5)
    assert not torch.allclose(tuned, tune_tiny(tmp_path / "half", batch_size=4), atol=1e-4)  # it would notice


def test_gradient_accumulation_equals_a_large_batch(tmp_path: Path) -> None:
    large = tune_tiny(tmp_path / "large", batch_size=8)
    accumulated = tune_tiny(tmp_path / "accumulated", batch_size=4, gradient_accumulation_steps=2)
    assert torch.allclose(large, accumulated, atol=1e-5)
