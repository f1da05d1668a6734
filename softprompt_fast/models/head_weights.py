"""The weights of a model's head that come with its prompts, from adapter folders and checkpoints."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hf.heads import head_state, loadable_modules, path_inside
from ..prompts.checkpoints import read_head_checkpoint
from ..prompts.head_files import head_names, read_head
from ..prompts.peft_files import weights_file
from .head_users import head_changed, prompts_of_others


def stored_head(source: PathLike[str] | str, model: Any) -> dict[str, Tensor]:
    """The weights of a model's head that an adapter folder or a checkpoint of Trainer holds, by their names in it.

    Raises:
        ValueError: a tensor has another shape than the model's; with both.
    """
    own = head_state(model, loadable_modules(model))
    weights = weights_file(source)
    head = read_head(weights, own.keys() & set(head_names(weights)))
    if not head:
        saved = read_head_checkpoint(Path(source), path_inside(model))
        head = {name: value for name, value in saved.items() if name in own}
    for name, value in head.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{source}: `{name}` must have shape {list(own[name].shape)} like the model's head, got "
                f"{list(value.shape)}"
            )
        if not own[name].is_floating_point():
            raise ValueError(f"{source}: `{name}` cannot be loaded: the model's head is quantised")
    return head


def check_one_head(
    source: PathLike[str] | str, head: dict[str, Tensor], model: Any, user: Any, names: list[str]
) -> None:
    """Refuses a prompt if it, or prompts that use the model's head now, would run with a head that is not theirs.

    Args:
        head: what came with the prompt.
        user: the object that gets the prompt.
        names: of its other prompts. Those of other objects over the same model count too.

    Raises:
        ValueError: the prompt has another head than the model, or none while the model's head is that of other prompts.
    """
    own = head_state(model, loadable_modules(model))
    different = _different(head, own)
    if not different and (head or not own or not head_changed(model)):
        return
    others = list(dict.fromkeys([*names, *prompts_of_others(model, user)]))
    if not others:
        return
    if different:
        raise ValueError(
            f"{source}: `{different[0]}` differs from the model's, which the prompts {', '.join(others)} use; a model "
            "has one head: load this prompt into another model, or replace the head with force=True"
        )
    raise ValueError(
        f"{source}: the prompt must have a head, because the model's came with or was trained for the prompts "
        f"{', '.join(others)}; load this prompt into another model, or use their head with force=True"
    )


def _different(head: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    return [name for name, value in head.items() if not torch.equal(own[name], value.to(own[name]))]


@torch.no_grad()
def install_head(head: dict[str, Tensor], model: Any) -> tuple[str, ...]:
    """Gives a model the weights of a head, and returns the names of its modules."""
    modules = loadable_modules(model)
    own = head_state(model, modules)
    for name in _different(head, own):  # writing the same numbers would count as a change
        own[name].copy_(head[name])
    return tuple(module for module in modules if any(name.startswith(f"{module}.") for name in head))
