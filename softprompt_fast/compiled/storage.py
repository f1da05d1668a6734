"""Compiled prompts on disk: safetensors, tied to the weights of the model that computed them."""

from __future__ import annotations

import hashlib
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.files import save_tensors_atomically

FILE_FORMAT = "softprompt_fast compiled prompt 1"
_known: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def fingerprint(model: Any) -> str:
    """A hash of every parameter and buffer of a model and of its class.

    Computed once per model object, about a second per gigabyte; the weights must not change afterwards.
    """
    with _lock:
        if model not in _known:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(type(model).__name__.encode())
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            _known[model] = digest.hexdigest()
        return _known[model]


def save(path: Path, values: Tensor, vectors: Tensor, model: Any) -> None:
    """Writes a compiled prompt [L, 2, P, H', E] and the vectors [P, D] it was computed from; the file appears whole."""
    tensors = {"compiled": values.detach().cpu().contiguous(), "prompt_embeddings": vectors.detach().cpu().contiguous()}
    save_tensors_atomically(path, tensors, {"format": FILE_FORMAT, "model": fingerprint(model)})


def load(path: Path, model: Any) -> tuple[Tensor, Tensor]:
    """Reads a compiled prompt: its keys and values, and the vectors that it was computed from.

    Raises:
        ValueError: not such a file, or made with other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FILE_FORMAT or set(file.keys()) != {"compiled", "prompt_embeddings"}:
                raise ValueError(f"{path} must be a compiled prompt, got {facts.get('format')!r}")
            if facts.get("model") != fingerprint(model):
                raise ValueError(f"{path} was compiled with other weights than this model's; compile the prompt again")
            return file.get_tensor("compiled"), file.get_tensor("prompt_embeddings")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
