"""Compiled prompts of a :class:`SoftPromptModel`, kept between calls of ``generate``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hf.adapters import adapter_state
from ..hf.embedding import vectors_like
from ..packed.runner import PackedRunner
from .compile import compile_prompts, slot_shape

BUDGET = 256 * 2**20
"""Bytes of keys and values that are kept."""
SAMPLES = 4
"""Numbers of each parameter that show whether a model has changed."""


class PromptCache:
    """Keys and values of the prompts that were used last.

    A prompt is found by its numbers, so a changed prompt is compiled again. If the model changes, all are dropped.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, Tensor] = {}
        self._model: bytes = b""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files of a model do not contain what can be computed again."""
        return PromptCache().__dict__

    def table(self, runner: PackedRunner, prompts: Sequence[Tensor]) -> Tensor:
        """[L, 2, sum of P_n, H', E] of prompts [P_n, D].

        Raises:
            Unsupported: the model cannot run the packed layout.
        """
        if not prompts:
            layers, two, heads, size = slot_shape(runner.model)
            return vectors_like(runner.model.get_input_embeddings()).new_empty(layers, two, 0, heads, size)
        model = fingerprint(runner.model)
        entries = dict(self._entries) if model == self._model else {}
        keys = [_digest(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in entries}
        if missing:
            values = compile_prompts(runner, list(missing.values())).split([len(p) for p in missing.values()], 2)
            entries |= {key: value.clone() for key, value in zip(missing, values, strict=True)}
        table = torch.cat([entries[key] for key in keys], 2)
        used = [(key, entries.pop(key)) for key in dict.fromkeys(keys)]
        entries.update(used)  # the last used are the last
        total = sum(value.nbytes for value in entries.values())
        while total > BUDGET:
            total -= entries.pop(next(iter(entries))).nbytes
        self._entries, self._model = entries, model
        return table


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().float().cpu().contiguous()
    return hashlib.sha256(str(list(values.shape)).encode() + values.numpy().tobytes()).digest()


def fingerprint(model: Any) -> bytes:
    """Changes whenever parameters or the state of adapters change: by places, versions and some of the numbers."""
    facts: list[Any] = []
    samples: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        facts.append((_place(parameter), parameter._version, parameter.dtype))
        if type(parameter.data) is not Tensor or parameter.device.type == "meta":
            continue
        flat = parameter.detach().reshape(-1)
        samples.setdefault(parameter.device, []).append(flat[:: max(1, len(flat) // SAMPLES)].float())
    for module in model.modules():
        facts += adapter_state(module)
    digest = hashlib.sha256(repr(facts).encode())
    for parts in samples.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.digest()


def weights_version(model: Any) -> tuple[Any, ...]:
    """As :func:`fingerprint`, but reads no numbers, so that nothing waits for a GPU; it takes a few milliseconds.

    A change by way of ``.data`` is not seen.
    """
    facts: list[Any] = []
    waiting, seen = [model], set()
    while waiting:  # `modules()` takes longer
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        waiting += [part for part in own["_modules"].values() if part is not None]
        facts += [(_place(each), each._version) for each in own["_parameters"].values() if each is not None]
        facts += adapter_state(module)
    return tuple(facts)


def _place(parameter: Tensor) -> int:
    """Where the numbers are; of a tensor that holds others (a quantised one), which object it is.

    0: they are offloaded, and each forward pass makes other objects.
    """
    return parameter.data_ptr() or (0 if parameter.device.type == "meta" else id(parameter))
