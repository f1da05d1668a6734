"""What a run must remember to be resumed: what it was asked, its last complete checkpoint, its scores so far."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import digest
from .settings import TuningSettings

if TYPE_CHECKING:
    from .job import TuningJob

FACTS, HISTORY = "run.json", "history.json"
MAY_CHANGE = ("steps", "epochs", "patience")
"""Settings that a run may be resumed with other values of."""
History = list[list[dict[str, float]]]


def run_facts(
    model: SoftPromptModel, jobs: Sequence[TuningJob], settings: TuningSettings, shared_tokens: int
) -> dict[str, Any]:
    """All that decides a prompt, by the names of ``tune``'s arguments, as JSON gives it back."""
    facts: dict[str, Any] = {key: value for key, value in settings.to_json().items() if key not in MAY_CHANGE}
    base = model.base_model
    facts["model"] = f"{type(model).__name__} on {type(base).__name__} {getattr(base, 'name_or_path', '')} {base.dtype}"
    facts["shared_tokens"] = shared_tokens
    for job in jobs:
        name = job.task.prompt
        facts[f"task of {name!r}"] = asdict(job.task)
        facts[f"train_rows of {name!r}"] = digest(job.train_rows)
        facts[f"held_out_rows of {name!r}"] = digest(job.held_out_rows)
        if job.settings is not None:
            facts[f"settings of {name!r}"] = {k: v for k, v in job.settings.to_json().items() if k not in MAY_CHANGE}
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


class RunRecord:
    """The files of a run beside its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds_before = 0.0
        """Of tuning without evaluations, until the checkpoint that is resumed."""

    def exists(self) -> bool:
        return (self.folder / FACTS).is_file()

    def start(self, facts: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(FACTS, facts)

    def resume(self, facts: dict[str, Any]) -> str | None:
        """The last complete checkpoint; None: the run ended before its first one.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: the run was asked something else, by name.
        """
        if not self.exists():
            raise FileNotFoundError(f"nothing to resume: {self.folder} holds no run")
        checkpoints = [str(c.parent) for c in self.folder.glob("checkpoint-*/trainer_state.json")]
        before = json.loads((self.folder / FACTS).read_text())
        changed = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        if changed:
            key = changed[0]
            also = f" (also changed: {', '.join(changed[1:])})" if changed[1:] else ""
            raise ValueError(f"`{key}` must be {before.get(key)!r} as before to resume, got {facts.get(key)!r}{also}")
        return max(checkpoints, key=step_of, default=None)

    def history(self, names: Sequence[str], last: str | None) -> History:
        """Scores of each prompt until a checkpoint."""
        file = self.folder / HISTORY
        if last is None or not file.is_file():
            return [[] for _ in names]
        stored = json.loads(file.read_text())
        found = [[point for point in stored.get(name, []) if point["step"] <= step_of(last)] for name in names]
        self.seconds_before = max((point["seconds"] for one in found for point in one), default=0.0)
        return found

    def write_history(self, names: Sequence[str], history: History) -> None:
        self._write(HISTORY, dict(zip(names, history, strict=True)))

    def _write(self, name: str, values: Any) -> None:
        partial = self.folder / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(partial, self.folder / name)
