"""Tensors in safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

KEY = "prompt_embeddings"
"""PEFT's name of a prompt's tensor."""
HEADER_LIMIT = 100_000_000
"""Bytes of a header that the library reads."""
FACTORS = ("token_update_a", "token_update_b")


def read_tensor(path: Path, key: str | None = None) -> Tensor:
    """A tensor of a safetensors file, in float32.

    Args:
        key: None: the file's only tensor, or the one named KEY; a file that also holds a token update is refused.

    Raises:
        ValueError: not a safetensors file, no such tensor, or its numbers are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if key is None and set(FACTORS) & set(keys):
                raise ValueError(f"{path} must hold a prompt alone, got a prompt with a token update")
            if key is None:
                key = KEY if KEY in keys else keys[0] if len(keys) == 1 else None
            elif key not in keys:
                raise ValueError(f"{path} must hold {key!r}, got {keys}")
            if key is None:
                raise ValueError(f"{path} must hold one tensor, or one named {KEY!r}, got {keys}")
            values: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    if not values.is_floating_point() or not torch.isfinite(values).all():
        raise ValueError(f"{path}: `{key}` must be finite floating-point numbers")
    return values.float()


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and the texts in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error


def read_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of a tensor that a safetensors file holds; its numbers are not read."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(name).get_shape())


def is_safetensors(start: bytes) -> bool:
    """Whether a file is one, by its first bytes: the length of its header, and a brace."""
    return int.from_bytes(start[:8], "little") <= HEADER_LIMIT and start[8:9] == b"{"
