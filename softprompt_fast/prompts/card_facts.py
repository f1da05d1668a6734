"""What a model card says of a prompt, read from the prompt's folder and from the files of its run beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ..hf.loading import SMOLLM2
from ..tasks.task import TASK_FILE, Task
from .multitask_files import MULTITASK
from .peft_files import (
    CARTRIDGE,
    CPT,
    DEEP,
    DEEP_TYPES,
    P_TUNING,
    PLAIN,
    UPDATED,
    read_base,
    read_config,
)
from .run_files import retention_facts, run_facts, version_facts

METHODS = {
    PLAIN: "prompt-tuning",
    P_TUNING: "p-tuning",
    MULTITASK: "multitask-prompt-tuning",
    CPT: "cpt",
    DEEP: "prefix-tuning",
    CARTRIDGE: "cartridge",
    UPDATED: "prompt-tuning-with-token-update",
}
"""What the methods are called on the Hub."""
HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card."""

    name: str
    method: str
    """PEFT's name of the method, such as PROMPT_TUNING."""
    tokens: int
    task_type: str | None
    """PEFT's name of the kind of model, such as CAUSAL_LM."""
    base: str | None
    """Hub name of the base model, or the last part of its path."""
    base_is_local: bool
    """Whether others cannot find the base model by its name."""
    fingerprint: str | None
    task: Task | None
    run: dict[str, Any]
    retention: dict[str, Any]
    source: str
    """What ``from_pretrained`` is given: a repository on the Hub, or a path."""
    subfolder: str | None = None
    """Folder of the prompt in a repository with several."""

    @property
    def deep(self) -> bool:
        return self.method in DEEP_TYPES

    def pushed(self, repository: str, subfolder: str | None, base: str | None) -> CardFacts:
        """The facts of the same prompt in a repository.

        Args:
            base: Hub name of the base model; None: as the folder says.
        """
        changed = replace(self, source=repository, subfolder=subfolder)
        return changed if base is None else replace(changed, base=base, base_is_local=False)


def card_facts(folder: Path) -> CardFacts:
    """The facts of an adapter folder's card.

    Raises:
        FileNotFoundError: no such folder.
    """
    config = read_config(folder, None)
    stored, fingerprint = read_base(folder)
    task = Task.load(folder) if (folder / TASK_FILE).is_file() else None
    base = (task.model if task is not None else None) or stored
    return CardFacts(
        name=task.prompt if task is not None else folder.resolve().name,
        method=str(config.get("peft_type")),
        tokens=int(config.get("num_virtual_tokens") or 0),
        task_type=config.get("task_type"),
        base=None if base is None else without_folders(base),
        base_is_local=base is None or base == SMOLLM2 or is_local(base),
        fingerprint=fingerprint,
        task=task,
        run=run_facts(folder) or version_facts(folder),
        retention=retention_facts(folder),
        source=f"path/to/{folder.resolve().name}",
    )


def is_local(model: str) -> bool:
    """Whether the name of a model is a path and not a name on the Hub."""
    return HUB_MODEL.fullmatch(model) is None or Path(model).exists()


def without_folders(value: Any) -> Any:
    """A value in which absolute paths are replaced by their last part: a card is read by others."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and "\n" not in value and (os.path.isabs(value) or value.startswith("~")):
        return PurePath(value).name
    return value
