"""Which implementation of the ops runs: the native extension or its plain-PyTorch twin. Fake kernels live here too."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ...base.compiling import constant_when_compiled
from . import build as _build

logger = logging.getLogger("softprompt_fast")
CHOICES = ("auto", "native", "reference")


@dataclass
class State:
    """What this process uses, and why. Settled once, by the first call that needs an op."""

    name: str  # "native" or "reference"
    reason: str
    module: ModuleType | None = None
    info: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ops:
    """The native ops, bound once: attribute look-ups in ``torch.ops`` cost more than a small call."""

    assemble: Callable[..., Any]
    prompt_backward: Callable[..., Any]
    embedding_backward: Callable[..., Any]
    unpack: Callable[..., Any]
    pack: Callable[..., Any]
    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]


_settling = threading.Lock()
_state: State | None = None
_ops: Ops | None = None
_warned_devices: set[str] = set()


def state() -> State:
    """The active backend; decides and, if need be, compiles on the first call.

    Raises:
        ValueError: ``SOFTPROMPT_FAST_BACKEND`` holds an unknown word.
        BuildUnavailable: ``SOFTPROMPT_FAST_BACKEND=native`` and the extension cannot be had.
    """
    global _state
    if _state is None:
        with _settling:
            _state = _state or _settle()
    return _state


def _settle() -> State:
    global _ops
    choice = os.environ.get("SOFTPROMPT_FAST_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"SOFTPROMPT_FAST_BACKEND must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "reference":
        return State("reference", "SOFTPROMPT_FAST_BACKEND=reference")
    try:
        module = _build.load()
    except _build.BuildUnavailable as error:
        if choice == "native":
            raise
        logger.warning("the plain-PyTorch implementation is used: %s", error)
        return State("reference", str(error))
    _ops = bind(_build.NAMESPACE)
    return State("native", "the extension is built and loads", module, module.build_info())


def bind(namespace: str) -> Ops:
    """Registers the fake kernels of a loaded extension's ops and returns the ops."""
    library = getattr(torch.ops, namespace)
    torch.library.register_fake(f"{namespace}::assemble", _fake_assemble)
    torch.library.register_fake(f"{namespace}::prompt_backward", _fake_prompt_backward)
    torch.library.register_fake(f"{namespace}::embedding_backward", _fake_embedding_backward)
    torch.library.register_fake(f"{namespace}::unpack", _fake_unpack)
    torch.library.register_fake(f"{namespace}::pack", _fake_pack)
    torch.library.register_fake(f"{namespace}::attention", _fake_attention)
    torch.library.register_fake(f"{namespace}::attention_backward", _fake_attention_backward)
    return Ops(**{name: getattr(library, name).default for name in Ops.__dataclass_fields__})


def ops_for(device: torch.device) -> Ops | None:
    """The native ops if they run on this device; None means the twin."""
    return _ops if _native_on(device.type) else None


@constant_when_compiled
def _native_on(device_type: str) -> bool:
    """Settles the backend on the first call; torch.compile takes the answer as a constant and never traces a build."""
    if _ops is None and state().name == "reference":
        return False
    if device_type in ("cpu", "meta"):
        return True
    info = state().info
    if device_type == "cuda" and info is not None and info["cuda"]:
        return True
    if device_type not in _warned_devices:
        _warned_devices.add(device_type)
        logger.warning("the extension has no %s kernels; plain PyTorch is used for tensors there", device_type)
    return False


def _fake_assemble(
    input_ids: torch.Tensor,
    embedding: torch.Tensor,
    prompts: torch.Tensor,
    prompt_offsets: torch.Tensor,
    prompt_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    plan: torch.Tensor | None,
    slots: int,
    width: int,
    prompt_segments: int,
    left: bool,
    mask_format: int,
    causal: bool,
    window: int,
    scale: float,
    token_update: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    rows, tokens = input_ids.shape
    lead = (1, slots) if plan is not None else (rows, width)
    mask_dtype = attention_mask.dtype if attention_mask is not None else torch.int64

    def long(*shape: int) -> torch.Tensor:
        return input_ids.new_empty(shape, dtype=torch.int64)

    masks = {
        0: lambda: long(0),
        1: lambda: input_ids.new_empty(lead, dtype=mask_dtype),
        2: lambda: input_ids.new_empty((rows, 1, width, width), dtype=torch.bool),
        3: lambda: embedding.new_empty((rows, 1, width, width)),
    }
    return (
        embedding.new_empty((*lead, embedding.shape[1])),
        masks[mask_format](),
        long(*lead),
        labels.new_empty(lead) if labels is not None else long(0),
        long(rows, tokens),
        long(prompt_segments if plan is not None else rows),
        long(slots if plan is not None else 0),
        long(5),
    )


def _fake_prompt_backward(
    grad: torch.Tensor,
    prompt_slots: torch.Tensor,
    use_ids: torch.Tensor | None,
    prompt_offsets: torch.Tensor,
    prompt_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return grad.new_empty((prompt_rows, grad.shape[-1]), dtype=dtype)


def _fake_embedding_backward(
    grad: torch.Tensor,
    input_ids: torch.Tensor,
    token_slots: torch.Tensor,
    vocabulary: int,
    padding_idx: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return grad.new_empty((vocabulary, grad.shape[-1]), dtype=dtype)


def _fake_unpack(packed: list[torch.Tensor], table: torch.Tensor, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.new_empty((table.shape[0], width, *x.shape[1:]), dtype=dtype) for x in packed]


def _fake_pack(rows: list[torch.Tensor], table: torch.Tensor, slots: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.new_empty((slots, *x.shape[2:]), dtype=dtype) for x in rows]


def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    slots, heads, _size = query.shape
    out = query.new_empty((slots, heads, value.shape[-1]))
    return out, query.new_empty((slots, heads), dtype=torch.float32)


def _fake_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    prefix_key: torch.Tensor | None,
    prefix_value: torch.Tensor | None,
    *_: Any,
) -> list[torch.Tensor]:
    inputs = [x for x in (query, key, value, prefix_key, prefix_value) if x is not None]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
