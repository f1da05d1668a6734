"""Two processes give the gradient of one on the same global batch; accumulated batches that of a large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tuning import reviews, tiny_tokenizer
from tiny_models import build

import softprompt_fast as spf
from softprompt_fast.tuning import tune
from softprompt_fast.task import classification_task

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    assert finished.stdout.count("equal") == 2


def test_gradient_accumulation_equals_a_large_batch(tmp_path: Path) -> None:
    prompts = []
    for size, accumulate in ((8, 1), (4, 2)):
        tuned = spf.SoftPromptModel(build("llama"))
        task = classification_task(reviews(), prompt="p")
        tune(
            tuned,
            tiny_tokenizer(),
            task,
            reviews(8),
            reviews(4),
            tmp_path / str(size),
            steps=2,
            batch_size=size,
            gradient_accumulation_steps=accumulate,
            num_virtual_tokens=4,
        )
        assert tuned.execution_report().execution == "shared"
        prompts.append(tuned.prompts["p"].detach())
    assert torch.allclose(prompts[0], prompts[1], atol=1e-5)
