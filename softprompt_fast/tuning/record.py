"""The files that let a run be resumed: what it was asked, its last complete checkpoint, its scores so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.files import write_atomically
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.base_identity import base_fingerprint
from ..tasks.examples import digest
from .job import TuningJob
from .settings import TuningSettings

CHECKPOINTS_FOLDER = "checkpoints"
FACTS_FILE, HISTORY_FILE = "run.json", "history.json"
MAY_CHANGE = ("steps", "epochs", "patience")
"""Settings that may differ when a run is resumed."""
History = list[list[dict[str, float]]]
"""The evaluations of each prompt, in the order of the jobs."""


def run_facts(
    model: SoftPromptModel, jobs: Sequence[TuningJob], settings: TuningSettings, shared_tokens: int
) -> dict[str, Any]:
    """All that decides a prompt, by the names of ``tune``'s arguments, as JSON gives it back."""
    facts: dict[str, Any] = {key: value for key, value in settings.to_json().items() if key not in MAY_CHANGE}
    if all(job.task.head is None for job in jobs):
        facts.pop("head_learning_rate")  # which runs of older versions did not have
    base = model.base_model
    if model.trains_head:
        facts["train_head"] = True
    facts["model"] = f"{type(model).__name__} on {type(base).__name__} {getattr(base, 'name_or_path', '')} {base.dtype}"
    adapters = base_fingerprint(base).split(":")[3:]
    if adapters:
        facts["model"] += f" with adapters {adapters[0]}"
    facts["shared_tokens"] = shared_tokens
    for job in jobs:
        name = job.task.prompt
        facts[f"task of {name!r}"] = job.task.to_json()
        facts[f"train_rows of {name!r}"] = digest(job.train_rows)
        facts[f"held_out_rows of {name!r}"] = digest(job.held_out_rows)
        if job.settings is not None:
            facts[f"settings of {name!r}"] = {k: v for k, v in job.settings.to_json().items() if k not in MAY_CHANGE}
    as_json: dict[str, Any] = json.loads(json.dumps(facts))
    return as_json


def step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


def seconds_in(history: History) -> float:
    """Seconds of tuning, without evaluations, up to the last evaluation."""
    return max((point["seconds"] for evaluations in history for point in evaluations), default=0.0)


class RunRecord:
    """The checkpoints of a run and the files beside them.

    Args:
        output: the run's output folder.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / CHECKPOINTS_FOLDER
        self.facts_file = self.folder / FACTS_FILE

    def start(self, facts: dict[str, Any]) -> None:
        _write(self.facts_file, facts)

    def resume(self, facts: dict[str, Any]) -> str | None:
        """The last complete checkpoint; None: the run ended before its first one.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: the run was asked something else; the message names what.
        """
        if not self.facts_file.is_file():
            raise FileNotFoundError(f"nothing to resume: {self.folder} holds no run")
        checkpoints = [str(c.parent) for c in self.folder.glob("checkpoint-*/trainer_state.json")]
        before = json.loads(self.facts_file.read_text())
        changed = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        if changed:
            key = changed[0]
            also = f" (also changed: {', '.join(changed[1:])})" if changed[1:] else ""
            raise ValueError(
                f"cannot resume: `{key}` was {before.get(key)!r} when the run started, got {facts.get(key)!r}{also}"
            )
        return max(checkpoints, key=step_of, default=None)

    def history(self, names: Sequence[str], checkpoint: str | None) -> History:
        """Evaluations of each prompt until a checkpoint."""
        file = self.folder / HISTORY_FILE
        if checkpoint is None or not file.is_file():
            return [[] for _ in names]
        stored = json.loads(file.read_text())
        return [[point for point in stored.get(name, []) if point["step"] <= step_of(checkpoint)] for name in names]

    def write_history(self, names: Sequence[str], history: History) -> None:
        _write(self.folder / HISTORY_FILE, dict(zip(names, history, strict=True)))


def _write(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")
