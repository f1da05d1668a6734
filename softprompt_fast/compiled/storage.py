"""Compiled prompts on disk: safetensors, tied to the weights of the model that computed them."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.files import save_tensors_atomically
from ..hf.adapters import adapter_state
from .prompt_cache import fingerprint as quick_fingerprint

FILE_FORMAT = "softprompt_fast compiled prompt 1"
_known: weakref.WeakKeyDictionary[Any, tuple[bytes, str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def fingerprint(model: Any) -> str:
    """A hash of every parameter and buffer of a model, of its class, and of the state of its adapters.

    It takes about a second per gigabyte, and is computed again when the model has changed.

    Raises:
        ValueError: weights are offloaded.
    """
    with _lock:
        state = quick_fingerprint(model)
        if model not in _known or _known[model][0] != state:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(type(model).__name__.encode())
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                for part in _plain(tensor.detach()):
                    digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            for module in model.modules():
                digest.update("".join(adapter_state(module)).encode())
            _known[model] = state, digest.hexdigest()
        return _known[model][1]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor consists of: itself, or the parts of a quantised one."""
    if tensor.device.type == "meta":
        raise ValueError("`model` must hold its weights to save or load compiled prompts, but they are offloaded")
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


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
