"""Reads prompts from the weight files that transformers' Trainer and accelerate write."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from .fast_soft_prompt import UPDATE_A, UPDATE_B
from .head_files import BASE
from .parameter_names import PARAMETER_PREFIX
from .placement import FORMS, names_with_frozen

WEIGHTS_FILE = "model.safetensors"
BANK_PREFIX = "prompts."


def read_checkpoint(folder: PathLike[str] | str) -> dict[str, Tensor] | None:
    """The prompts of a checkpoint, as a bank's ``state_dict``; None: the folder holds no such checkpoint.

    Raises:
        ValueError: the checkpoint holds a prompt in the form in which it is trained, not its values.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return None
    state = {
        key.removeprefix(BANK_PREFIX): value for key, value in load_file(path).items() if key.startswith(BANK_PREFIX)
    }
    frozen = tuple(f"{FORMS}{name}." for name in names_with_frozen(state))
    for key in state:
        if not key.startswith(frozen) and not key.startswith((PARAMETER_PREFIX, UPDATE_A, UPDATE_B)):
            raise ValueError(f"{path} must hold the values of prompts, got {key!r}; fold the prompt before saving")
    return state or None


def read_trained_weights(folder: PathLike[str] | str) -> dict[str, Tensor]:
    """Heads and adapters that a checkpoint holds beside prompts, by their names in a model's ``state_dict``."""
    path = Path(folder) / WEIGHTS_FILE
    state = load_file(path) if path.is_file() else {}
    return {key: value for key, value in state.items() if not key.startswith(BANK_PREFIX)}


def read_head_checkpoint(folder: PathLike[str] | str, path: str) -> dict[str, Tensor]:
    """The weights of the model that a checkpoint holds, such as those of a head, by their names in the model.

    Args:
        path: what these names begin with in the model that was trained, such as PEFT's around it.
    """
    start = BASE + path
    state = read_trained_weights(folder)
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def prompt_names(state: dict[str, Tensor]) -> list[str]:
    plain = [key.removeprefix(PARAMETER_PREFIX) for key in state if key.startswith(PARAMETER_PREFIX)]
    return plain + names_with_frozen(state)
