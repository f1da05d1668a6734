"""Prompts of several documents, one after the other: which were trained together, and one prompt of them.

Prompts that were trained apart disturb each other when they are joined (arXiv 2606.04557), so those that never stood
beside each other in training are joined with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..base.files import read_json, write_json
from ..base.locations import located
from ..prompts.base_identity import one_base
from ..prompts.card import write_card
from ..prompts.fast_soft_prompt import check_name
from ..prompts.peft_files import (
    FINGERPRINT,
    UPDATED,
    is_deep,
    is_prompt_folder,
    read_base,
    read_config,
    read_prefix,
    read_prompt,
    write_prefix,
    write_prompt,
)
from ..prompts.run_files import COMPOSITION_FILE
from ..tasks.task import TASK_FILE, Task

logger = logging.getLogger("softprompt_fast")


@dataclass(frozen=True)
class Composition:
    """What was trained together with a document's prompt."""

    run: str
    """An identifier of the training run."""
    documents: tuple[str, ...]
    """Names of the documents that the prompt holds."""
    beside: int
    """Largest number of other documents that stood beside one in training."""
    opening: int
    """Number of its first positions that stand once before all documents: BOS, or the opening of a chat."""

    def save(self, folder: Path) -> None:
        write_json(folder / COMPOSITION_FILE, asdict(self))


FIELDS = tuple(one.name for one in fields(Composition))


def read_composition(folder: Path) -> Composition | None:
    """None: the prompt was not trained as one of several documents."""
    values = read_json(folder / COMPOSITION_FILE)
    if values is None:
        return None
    try:
        return Composition(**values | {"documents": tuple(values["documents"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / COMPOSITION_FILE} must hold {', '.join(FIELDS)}, got {list(values)}") from error


def join_prompts(folders: Sequence[PathLike[str] | str], output: PathLike[str] | str) -> Path:
    """Writes one prompt that holds several, one after the other, and returns its folder.

    Args:
        folders: prompts of one base model and one form, in the order in which a request shall read them. What stands
            before all documents of a run is in each of their prompts, and once in the joined one.
        output: a new folder, whose name is that of the prompt. Its ``task.json`` is that of the first prompt that has
            one.

    Raises:
        FileExistsError: the output exists.
        FileNotFoundError, LookupError: there is no such folder or version.
        ValueError: no folder of a prompt, prompts of several base models, widths or forms, or one with a token update.
    """
    paths, output = [located(folder) for folder in folders], Path(output)
    if not paths:
        raise ValueError("`folders` must name at least one prompt, got none")
    for path in paths:
        if not is_prompt_folder(path):
            raise ValueError(f"`folders` must be folders of prompts, got {path}")
    check_name(output.name)
    if output.exists():
        raise FileExistsError(f"{output} already exists; choose another folder")
    one_base(paths)
    forms = [is_deep(path) for path in paths]
    if len(set(forms)) > 1:
        other = paths[forms.index(not forms[0])]
        raise ValueError(f"`folders` must have one form, got keys and values beside vectors: {paths[0]} and {other}")
    parts = [_values(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.shape[1] != parts[0].shape[1]:
            widths = f"{parts[0].shape[1]} ({paths[0]}) and {part.shape[1]} ({path})"
            raise ValueError(f"`folders` must have prompts of one width, got {widths}")
    found = [read_composition(path) for path in paths]
    _warn_of_strangers([path.name for path in paths], found)
    pairs = zip(parts[1:], found[1:], strict=True)
    values = torch.cat([parts[0], *(part[_repeated(part, one, parts[0], found[0]) :] for part, one in pairs)])
    task = next((Task.load(path) for path in paths if (path / TASK_FILE).is_file()), None)
    name, fingerprint = read_base(paths[0])
    config = read_config(paths[0], None)
    facts = {"task_type": config.get("task_type"), "base_model_name_or_path": name, FINGERPRINT: fingerprint}
    if forms[0]:
        write_prefix(output, values, _shape(paths[0]), facts)
    else:
        write_prompt(output, values, facts)
    known = [one for one in found if one is not None]
    if len(known) == len(found) and len({one.run for one in known}) == 1:
        documents = tuple(document for one in known for document in one.documents)
        replace(known[0], documents=documents).save(output)
    if task is not None:
        replace(task, prompt=output.name).save(output)
    write_card(output)
    return output


def _repeated(part: Tensor, known: Composition | None, first: Tensor, of_first: Composition | None) -> int:
    """The number of a prompt's [P, D] positions at which it repeats the opening of the first one [Q, D]."""
    if known is None or of_first is None or known.opening != of_first.opening:
        return 0
    count = known.opening
    return count if known.run == of_first.run or torch.equal(part[:count], first[:count]) else 0


def _warn_of_strangers(names: Sequence[str], found: Sequence[Composition | None]) -> None:
    """Warns of prompts that were not trained together."""
    if len(names) < 2:
        return
    known, shown = [one for one in found if one is not None], ", ".join(names)
    if len(known) < len(found) or len({one.run for one in known}) > 1:
        logger.warning("%s were not trained together: joined, they may answer as if none of them was there", shown)
    elif sum(len(one.documents) for one in known) > 1 + known[0].beside:
        logger.warning(
            "%s: in training at most %d others stood beside a document, so joined ones may answer worse",
            shown,
            known[0].beside,
        )


def _shape(folder: Path) -> tuple[int, int, int, int]:
    config = read_config(folder, None)
    layers, heads, width = (config[field] for field in ("num_layers", "num_attention_heads", "token_dim"))
    return layers, 2, heads, width // heads


def _values(folder: Path) -> Tensor:
    """[P, D] or, of keys and values, [P, W]."""
    if is_deep(folder):
        return read_prefix(folder, _shape(folder))[0]
    if read_config(folder, None).get("peft_type") == UPDATED:
        raise ValueError(f"`folders` must not have token updates, got {folder}")
    return read_prompt(folder)[0]
