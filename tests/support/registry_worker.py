"""A process of its own that adds versions to a registry, for tests of writers at the same time and of killed ones."""

from __future__ import annotations

from pathlib import Path

import torch

from softprompt_fast.prompts.peft_files import write_prompt
from softprompt_fast.registry import PromptRegistry
from softprompt_fast.tasks.task import Task

TASK = Task("classification", "{text}\nLabel:", "label", {"no": " no", "yes": " yes"})
BASE = {"base_model_name_or_path": "tiny", "base_fingerprint": "llama-3x32:0123:4567"}


def write_tiny_prompt(folder: Path, value: float = 0.0, tokens: int = 2, **facts: str) -> Path:
    """A prompt [tokens, 4] whose numbers all are ``value``, and its task."""
    write_prompt(folder, torch.full((tokens, 4), value), BASE | facts)
    TASK.save(folder)
    return folder


def add_versions(uri: Path, name: str, worker: int, count: int) -> None:
    """Adds versions whose numbers say who added them; every second one also becomes the production version.

    Writes the name of each to a file of this worker, once it is added.
    """
    registry = PromptRegistry(uri)
    with announced(uri, worker).open("a") as file:
        for i in range(count):
            folder = write_tiny_prompt(uri.parent / "work" / f"{worker}-{i}" / "p", worker * 1000 + i)
            print(registry.add(folder, name, alias="production" if i % 2 else None), file=file, flush=True)


def announced(uri: Path, worker: int) -> Path:
    return uri.parent / f"announced-{worker}.txt"
