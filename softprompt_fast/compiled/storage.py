"""Compiled prompts on disk: safetensors, tied to the weights of the model that computed them."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "softprompt_fast compiled prompt 1"
_known: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def fingerprint(model: Any) -> str:
    """A hash of every parameter and buffer of a model, and of what its configuration says of its forward pass.

    Read once per model object, about a second per gigabyte; weights are taken to be frozen.
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
    """Writes a compiled prompt [L, 2, P, H', E] and the vectors [P, D] it came from; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    tensors = {"compiled": values.detach().cpu().contiguous(), "prompt_embeddings": vectors.detach().cpu().contiguous()}
    save_file(tensors, partial, metadata={"format": FORMAT, "model": fingerprint(model)})
    os.replace(partial, path)


def load(path: Path, model: Any) -> tuple[Tensor, Tensor]:
    """The keys and values, and the vectors, of a compiled prompt.

    Raises:
        ValueError: not such a file, or made with other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT or set(file.keys()) != {"compiled", "prompt_embeddings"}:
                raise ValueError(f"{path} must be a compiled prompt, got {facts.get('format')!r}")
            if facts.get("model") != fingerprint(model):
                raise ValueError(f"{path} was compiled with other weights than this model's; compile the prompt again")
            return file.get_tensor("compiled"), file.get_tensor("prompt_embeddings")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
