"""Which implementation of the ops runs: the native extension or its twin in plain PyTorch."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch

from ...base.compiling import constant_when_compiled
from . import build, fake_kernels

logger = logging.getLogger("softprompt_fast")
CHOICES = ("auto", "native", "reference")


@dataclass
class State:
    """The backend of this process and the reason for it. Settled once, by the first call that needs an op."""

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
    """The active backend. The first call decides and, if necessary, compiles.

    Raises:
        ValueError: ``SOFTPROMPT_FAST_BACKEND`` holds an unknown word.
        BuildUnavailable: ``SOFTPROMPT_FAST_BACKEND=native`` and the extension is not available.
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
        module = build.load()
    except build.BuildUnavailable as error:
        if choice == "native":
            raise
        logger.warning("the plain-PyTorch implementation is used: %s", error)
        return State("reference", str(error))
    _ops = bind(build.NAMESPACE)
    return State("native", "the extension is built and loads", module, module.build_info())


def bind(namespace: str) -> Ops:
    """Registers the fake kernels of a loaded extension's ops and returns the ops."""
    library = getattr(torch.ops, namespace)
    names = [field.name for field in fields(Ops)]
    for name in names:
        torch.library.register_fake(f"{namespace}::{name}", getattr(fake_kernels, name))
    return Ops(**{name: getattr(library, name).default for name in names})


def native_ops() -> Ops | None:
    """The native ops if they are the backend; None means the twin."""
    state()
    return _ops


def ops_for(device: torch.device) -> Ops | None:
    """The native ops if they run on this device; None means the twin."""
    return _ops if _native_on(device.type) else None


@constant_when_compiled
def _native_on(device_type: str) -> bool:
    """Settles the backend on the first call. torch.compile takes the answer as a constant and never traces a build."""
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
