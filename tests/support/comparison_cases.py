"""Rows, tasks and jobs of the tests of comparisons."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from softprompt_fast.comparison.settings import Job, resolve_options
from softprompt_fast.comparison.work import Work
from softprompt_fast.tasks.task import Task, classification_task, generation_task
from support.tiny_models import build
from support.tiny_reviews import BAD, GOOD, reviews, tiny_tokenizer

TASK = classification_task(reviews())
ANSWERS = generation_task(input_column="text", output_column="label")
LONG_WORDS = Task("classification", "{text}", "label", {"yes": " very fine", "no": " dull"})


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Different texts; one telling word somewhere in each decides its label."""
    generator = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        label = len(rows) % 2
        words = [generator.choice(["film", "plot", "very"]) for _ in range(generator.randint(2, 9))]
        words.insert(generator.randrange(len(words)), generator.choice((BAD, GOOD)[label]))
        rows.setdefault(" ".join(words), {"text": " ".join(words), "label": ("no", "yes")[label]})
    return list(rows.values())


ROWS = sentences(200, 0)
SPLITS = {"train": ROWS[:100], "validation": ROWS[100:140], "test": ROWS[140:]}
FAST: dict[str, dict[str, Any]] = {
    "prompt": {"learning_rate": 0.3},
    "peft-prompt": {"learning_rate": 0.3},
    "lora": {"learning_rate": 1e-2},
    "full": {"learning_rate": 3e-3},
}


def job_of(method: str, folder: Path, task: Task = TASK, *, steps: int = 40, seed: int = 0, **options: Any) -> Job:
    given = FAST.get(method, {}) | options
    own = resolve_options(method, given, task=task, steps=steps, virtual_tokens=4, instruction=None)
    name = f"{method}-seed{seed}"
    return Job(
        method=method,
        seed=seed,
        model="tiny",
        dtype="float32",
        device="cpu",
        threads=None,
        task=asdict(task),
        options=own,
        batch_size=16,
        data=str(folder / "data"),
        data_digest="",
        model_digest="",
        result=str(folder / "runs" / f"{name}.json"),
        artifacts=str(folder / "artifacts" / name),
    )


def work_of(method: str, folder: Path, task: Task = TASK, **options: Any) -> Work:
    return Work(job_of(method, folder, task, **options), replace(task), build("llama"), tiny_tokenizer(), SPLITS)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


def result(method: str, seed: int, correct: list[int], **facts: Any) -> dict[str, Any]:
    costs = dict.fromkeys(("trainable_parameters", "stored_bytes", "prefix_tokens", "text_tokens"), 1.0)
    costs |= dict.fromkeys(("train_seconds", "evaluation_seconds", "flops_per_row", "flops_per_row_cached"), 1.0)
    costs |= dict.fromkeys(("memory_loaded", "memory_training", "memory_inference", "inference_seconds"), 1.0)
    rows = {
        "correct": correct,
        "predicted": ["yes" if hit else "no" for hit in correct],
        "losses": [0.1 if hit else 2.0 for hit in correct],
        "weights": [1.0] * len(correct),
    }
    return {"method": method, "seed": seed, "status": "ok", "options": {}, "rows": rows, **costs, **facts}
