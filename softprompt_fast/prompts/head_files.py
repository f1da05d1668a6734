"""The head of a model in an adapter folder, beside the prompt that it was trained with.

PEFT names the modules in ``modules_to_save`` of ``adapter_config.json``. A tensor's name in the file of weights is
``base_model.`` and its name in the model, such as ``base_model.score.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .tensor_files import read_header, read_shape, read_tensor

BASE = "base_model."
MODULES = "modules_to_save"


def head_names(weights: Path) -> list[str]:
    """The names, in the model, of the tensors of the model that a file of weights holds; none if there is no file.

    Raises:
        ValueError: not a safetensors file.
    """
    if not weights.is_file():
        return []
    return [name.removeprefix(BASE) for name in read_header(weights)[0] if name.startswith(BASE)]


def head_shapes(weights: Path) -> list[tuple[int, ...]]:
    """The shapes of the tensors that :func:`head_names` names; raises as it does."""
    return [read_shape(weights, BASE + name) for name in head_names(weights)]


def read_head(weights: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a model (float32) that a file of weights holds, by their names in the model.

    Raises:
        ValueError: not a safetensors file, no such tensor, or its numbers are not finite.
    """
    return {name: read_tensor(weights, BASE + name) for name in names}


def stored_names(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a head by their names in the file."""
    return {BASE + name: value for name, value in head.items()}
