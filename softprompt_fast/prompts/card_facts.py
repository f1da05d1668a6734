"""What a model card says of a prompt, read from the prompt's folder and from the files of its run beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ..hf.loading import SMOLLM2
from ..tasks.task import TASK_FILE, Task
from .head_files import head_shapes
from .multitask_files import MULTITASK
from .peft_files import (
    CARTRIDGE,
    CPT,
    DEEP,
    DEEP_TYPES,
    NAME,
    P_TUNING,
    PLAIN,
    UPDATED,
    WEIGHTS_FILE,
    read_base,
    read_config,
    safe_name,
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
FINGERPRINT = re.compile(r"[\w.-]+(:[\w-]+){2,3}")


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
    has_head: bool
    """Whether trained weights of the model's head come with the prompt."""
    outputs: int | None
    """Labels of the model's head; None: it has none, or their number is not known."""
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
    shapes = head_shapes(folder / WEIGHTS_FILE)
    task = Task.load(folder) if (folder / TASK_FILE).is_file() else None
    base = (task.model if task is not None else None) or stored
    return CardFacts(
        name=_named(task.prompt if task is not None else folder.resolve().name, NAME),
        method=safe_name(str(config.get("peft_type"))),
        tokens=int(config.get("num_virtual_tokens") or 0),
        task_type=str(config.get("task_type")),
        base=None if base is None else public_name(str(base)),
        base_is_local=base is None or base == SMOLLM2 or is_local(base),
        fingerprint=fingerprint if fingerprint is not None and FINGERPRINT.fullmatch(fingerprint) else None,
        has_head=bool(shapes),
        outputs=_outputs(task, shapes, config.get("token_dim")),
        task=task,
        run=run_facts(folder) or version_facts(folder),
        retention=retention_facts(folder),
        source=f"path/to/{_named(folder.resolve().name, HUB_MODEL)}",
    )


def is_local(model: str) -> bool:
    """Whether the name of a model is a path and not a name on the Hub."""
    return HUB_MODEL.fullmatch(model) is None or Path(model).exists()


def public_name(model: str) -> str:
    """The name of a base model without the folders of this machine, and without characters that a card could obey."""
    if not is_local(model):
        return model
    return _named(PurePath(os.path.abspath(os.path.expanduser(model))).name, HUB_MODEL)


def _named(text: str, allowed: re.Pattern[str]) -> str:
    """A name as it is, or made safe: names come from files of others, and a card is text that is read and run."""
    return text if allowed.fullmatch(text) else safe_name(text)


def _outputs(task: Task | None, shapes: list[tuple[int, ...]], hidden: Any) -> int | None:
    """The labels of a head, as its task says or as its weights do: one matrix does not give a hidden state."""
    if task is not None:
        return len(task.labels) if task.head is not None and task.labels else None
    sizes = {shape[0] for shape in shapes if len(shape) == 2}
    if len(sizes) > 1:
        sizes -= {hidden}
    return sizes.pop() if len(sizes) == 1 else None


def without_folders(value: Any) -> Any:
    """A value in which absolute paths are replaced by their last part: a card is read by others."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and "\n" not in value and (os.path.isabs(value) or value.startswith("~")):
        return PurePath(value).name
    return value
