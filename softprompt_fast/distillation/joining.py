"""Prompts of several documents, one after the other: which were trained together, and one prompt of them.

Prompts that were trained apart disturb each other when they are joined (arXiv 2606.04557), so those that never stood
beside each other in training are joined with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..base.files import read_json, write_json
from ..base.locations import located
from ..prompts.base_identity import one_base
from ..prompts.card import write_card
from ..prompts.peft_files import (
    FINGERPRINT,
    is_deep,
    is_prompt_folder,
    read_base,
    read_config,
    read_prefix,
    read_prompt,
    write_prefix,
    write_prompt,
)
from ..tasks.task import TASK_FILE, Task

logger = logging.getLogger("softprompt_fast")
COMPOSITION_FILE = "composition.json"
"""Beside the weights of a document's prompt."""


@dataclass(frozen=True)
class Composition:
    """What was trained together with a document's prompt."""

    run: str
    """An identifier of the training run."""
    documents: tuple[str, ...]
    """Names of the prompts of the run."""
    beside: int
    """Largest number of other documents that stood beside one in training."""
    opening: str | None
    """Name of the prompt, in the same folder, that stands before all documents: BOS, or the opening of a chat."""

    def save(self, folder: Path) -> None:
        write_json(folder / COMPOSITION_FILE, asdict(self))


def read_composition(folder: Path) -> Composition | None:
    """None: the prompt was not trained as one of several documents."""
    values = read_json(folder / COMPOSITION_FILE)
    return None if values is None else Composition(**values | {"documents": tuple(values["documents"])})


def join_prompts(folders: Sequence[PathLike[str] | str], output: PathLike[str] | str) -> Path:
    """Writes one prompt that holds several, one after the other, and returns its folder.

    Args:
        folders: prompts of one base model and one form, in the order in which a request shall read them.
        output: a new folder. Its ``task.json`` is that of the first prompt that has one.

    Raises:
        FileExistsError: the output exists.
        ValueError: no folder of a prompt, prompts of several base models, or vectors beside keys and values.
    """
    paths, output = [located(folder) for folder in folders], Path(output)
    if not paths:
        raise ValueError("`folders` must name at least one prompt, got none")
    for path in paths:
        if not is_prompt_folder(path):
            raise ValueError(f"`folders` must be folders of prompts, got {path}")
    if output.exists():
        raise FileExistsError(f"{output} already exists; choose another folder")
    one_base(paths)
    forms = [is_deep(path) for path in paths]
    if len(set(forms)) > 1:
        other = paths[forms.index(not forms[0])]
        raise ValueError(f"`folders` must have one form, got keys and values beside vectors: {paths[0]} and {other}")
    opening = _opening(paths)
    read = paths if opening is None else [opening, *paths]
    values = torch.cat([_values(path) for path in read])
    config = read_config(paths[0], None)
    name, fingerprint = read_base(paths[0])
    facts = {"task_type": config.get("task_type"), "base_model_name_or_path": name, FINGERPRINT: fingerprint}
    if forms[0]:
        write_prefix(output, values, _shape(paths[0]), facts)
    else:
        write_prompt(output, values, facts)
    if task := next((path for path in paths if (path / TASK_FILE).is_file()), None):
        replace(Task.load(task), prompt=output.name).save(output)
    write_card(output)
    return output


def _opening(paths: Sequence[Path]) -> Path | None:
    """The prompt before all documents, if they have one; warns of prompts that were not trained together."""
    found = [read_composition(path) for path in paths]
    known = [one for one in found if one is not None]
    names = ", ".join(path.name for path in paths)
    if len(paths) > 1 and (len(known) < len(paths) or len({one.run for one in known}) > 1):
        logger.warning("%s were not trained together: joined, they may answer as if none of them was there", names)
    elif len(paths) > 1 and len(paths) > 1 + min(one.beside for one in known):
        logger.warning(
            "%s: in training at most %d others stood beside a prompt, so joined ones may answer worse",
            names,
            min(one.beside for one in known),
        )
    openings = {path.parent / one.opening for path, one in zip(paths, found, strict=True) if one and one.opening}
    if len(openings) > 1:
        logger.warning("%s have several openings, of which the first is used", names)
    return min(openings, default=None)


def _shape(folder: Path) -> tuple[int, int, int, int]:
    config = read_config(folder, None)
    layers, heads, width = (config[field] for field in ("num_layers", "num_attention_heads", "token_dim"))
    return layers, 2, heads, width // heads


def _values(folder: Path) -> Tensor:
    """[P, D] or, of keys and values, [P, W]."""
    return read_prefix(folder, _shape(folder))[0] if is_deep(folder) else read_prompt(folder)[0]
