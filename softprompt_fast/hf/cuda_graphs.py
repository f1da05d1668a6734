"""What a CUDA graph of a transformers model depends on, and what all owners of such graphs have in common."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

logger = logging.getLogger("softprompt_fast")
Graph = TypeVar("Graph")
HARMLESS_ATTRIBUTE = "_softprompt_fast_harmless"
"""Attribute of a hook or of a module's ``forward`` of this library: a graph already does what it would do."""


class ModelGraphs(Generic[Graph]):
    """The graphs of one model. All of them are dropped when its weights or modules change."""

    way = "run"
    """What the model does in them."""

    def __init__(self) -> None:
        self.stopped: str | None = None
        """Why nothing runs as a graph any more."""
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._state: tuple[Any, ...] = ()
        self._pool: Any = None
        self._stream: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # another process, or a copy of the model, captures its own

    def __len__(self) -> int:
        return len(self._graphs)

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None

    def _follow(self, model: Any, device: torch.device) -> bool:
        """Whether a graph would do what the model does now."""
        state = model_state(model, device)
        if state != self._state:
            self._forget()
            self._state = state
        return bool(state)

    def _stop(self, model: Any, error: Exception, device: torch.device) -> None:
        self.stopped = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._graphs.clear()
        logger.warning("%s does not %s as CUDA graphs: %s", type(model).__name__, self.way, self.stopped)
        end_failed_capture(device)

    def _wait_for_last(self) -> None:
        """Another stream may still use the graphs' memory."""
        if not torch.cuda.is_available():
            return
        stream = torch.cuda.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def calls_as_usual(device: torch.device) -> bool:
    """Whether Python now wants to change or to see what is computed, which a graph would not let it."""
    return (
        torch.is_autocast_enabled(device.type)
        or torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
    )


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


@contextmanager
def side_stream(device: torch.device) -> Iterator[Any]:
    """A stream to warm libraries up on and to capture on; it and the current one wait for each other."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    yield stream
    current.wait_stream(stream)


def end_failed_capture(device: torch.device) -> None:
    """A capture that failed leaves the random numbers of the device unusable until another one has succeeded."""
    if device.type == "cuda":
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            torch.zeros(1, device=device)


def model_state(model: Any, device: torch.device) -> tuple[Any, ...]:
    """What a graph of a model depends on; empty: a graph would not do what the model does.

    A graph has the addresses of the weights, and calls no Python: no hook, no random choice of layers.
    """
    config = model.config
    facts: list[Any] = [config._attn_implementation]
    for module in model.modules():  # every batch and every new token waits for this
        training = module.training
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            if hooks and not all(map(_harmless, hooks.values())):
                return ()
        if training and getattr(module, "gradient_checkpointing", False):
            return ()
        forward = module.__dict__.get("forward")
        if getattr(forward, HARMLESS_ATTRIBUTE, False) is True:
            forward = None
        facts += (id(module), training, forward)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if tensor.requires_grad or tensor.device != device:
                    return ()
                facts.append(tensor.data_ptr())
    if model.training and _chance(config):
        return ()
    return tuple(facts)


def _harmless(hook: Any) -> bool:
    ours: bool = getattr(hook, HARMLESS_ATTRIBUTE, False) is True
    return ours or getattr(hook, "__module__", "").startswith("transformers.")


def _chance(config: Any) -> bool:
    """Whether training draws random numbers, such as for dropout."""
    values = config.get_text_config().to_dict().items()
    named = (value for name, value in values if "drop" in name or "jitter" in name)
    return any(isinstance(value, (int, float)) and value > 0 for value in named)
