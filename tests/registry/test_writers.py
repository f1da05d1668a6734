"""Several processes write at the same time, and some are killed: no version is lost, doubled or without its files."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.registry_worker import add_versions, announced, write_tiny_prompt

from softprompt_fast.registry import PromptRegistry

PROCESSES = int(os.environ.get("REGISTRY_PROCESSES", "3"))
VERSIONS = int(os.environ.get("REGISTRY_VERSIONS", "4"))
KILLS = int(os.environ.get("REGISTRY_KILLS", "4"))
LONGEST_LIFE = float(os.environ.get("REGISTRY_SECONDS", "1"))
"""The full test: 8 processes, 50 versions each, 50 kills."""


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts processes quickly: they are forked from one that has imported everything and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.registry_worker", "softprompt_fast.registry.prompt_registry", "mlflow"])
    return context


def values(registry: PromptRegistry, name: str) -> list[float]:
    """The number that each version's prompt holds."""
    folders = [registry.fetch(str(version)) for version in registry.versions(name)]
    return [float(load_file(f / "adapter_model.safetensors")["prompt_embeddings"][0, 0]) for f in folders]


def test_writers_at_the_same_time_lose_and_double_nothing(processes: Any, tmp_path: Path) -> None:
    uri = tmp_path / "registry"  # which the first of them makes
    workers = [
        processes.Process(target=add_versions, args=(uri, "sentiment", number, VERSIONS)) for number in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * PROCESSES
    printed = [line for number in range(PROCESSES) for line in announced(uri, number).read_text().split()]
    registry = PromptRegistry(uri)
    numbers = [version.number for version in registry.versions("sentiment")]
    assert numbers == list(range(1, PROCESSES * VERSIONS + 1))
    assert sorted(printed) == sorted(f"sentiment@{number}" for number in numbers)
    expected = [float(worker * 1000 + i) for worker in range(PROCESSES) for i in range(VERSIONS)]
    assert sorted(values(registry, "sentiment")) == expected
    assert registry.verify() == []


def test_a_killed_writer_leaves_nothing_broken(processes: Any, tmp_path: Path) -> None:
    uri = tmp_path / "registry"
    delays = random.Random(0)
    known: list[str] = []
    for kill in range(KILLS):
        worker = processes.Process(target=add_versions, args=(uri, "sentiment", kill, 1000))
        worker.start()
        file = announced(uri, kill)
        while kill % 4 and not (file.is_file() and file.read_text()):  # three of four are killed between their versions
            time.sleep(0.01)
        time.sleep(delays.uniform(0, LONGEST_LIFE))
        worker.kill()
        worker.join()
        known += file.read_text().splitlines() if file.is_file() else []
        registry = PromptRegistry(uri)
        known.append(str(registry.add(write_tiny_prompt(tmp_path / f"after-{kill}", 1e6 + kill), "sentiment")))
        assert registry.verify() == []
        assert set(known) <= {str(version) for version in registry.versions("sentiment")}  # what was announced stays
    numbers = [version.number for version in registry.versions("sentiment")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(set(values(registry, "sentiment"))) == len(numbers)
    print(f"{KILLS} kills, {len(numbers)} versions")
