"""The parameters of a model's head while it is trained, and their file beside the prompt's."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..hf.architecture import without_adapters
from ..models.soft_prompt_model import SoftPromptModel

HEAD_FILE = "head.safetensors"


def head_parameters(model: SoftPromptModel) -> dict[str, nn.Parameter]:
    """The parameters of the head by their names in the base model; none if the head is not trained."""
    if not model.trains_head:
        return {}
    starts = tuple(f"{name}." for name in model.head_modules)
    base: nn.Module = without_adapters(model.base_model)
    return {name: value for name, value in base.named_parameters() if value.requires_grad and name.startswith(starts)}


def save_head(model: SoftPromptModel, folder: Path) -> None:
    """Writes the head, if it is trained; the file is whole or not there."""
    parameters = head_parameters(model)
    if parameters:
        partial = folder / f".{HEAD_FILE}.{os.getpid()}"
        save_file({name: value.detach().cpu().contiguous() for name, value in parameters.items()}, partial)
        os.replace(partial, folder / HEAD_FILE)


@torch.no_grad()
def load_head(model: SoftPromptModel, folder: Path) -> None:
    """Copies a head that :func:`save_head` wrote into the model, if the model's is trained."""
    parameters = head_parameters(model)
    if parameters:
        stored = load_file(folder / HEAD_FILE)
        for name, value in parameters.items():
            value.copy_(stored[name])
