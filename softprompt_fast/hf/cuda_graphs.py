"""What a CUDA graph of a transformers model depends on, and what all owners of such graphs have in common."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..base.precision import float32_precision
from .adapters import adapter_state
from .randomness import draws_random_numbers

logger = logging.getLogger("softprompt_fast")
Graph = TypeVar("Graph")
MOST_MEMORY = 1 / 8
"""Share of a GPU's memory."""
MOST_GRAPHS = 32
"""The graph that was not used for the longest time makes room."""
OTHER_STATES = 1
"""States of a model, beside the present one, whose graphs are kept."""
MORE_OUTPUT = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Settings of a configuration that ask for more than logits."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
HARMLESS_ATTRIBUTE = "_softprompt_fast_harmless"
"""Attribute of a hook or of a module's ``forward`` of this library: a graph already does what it would do."""


class ModelGraphs(Generic[Graph]):
    """The graphs of one model. All of them are dropped when something changes that they depend on.

    They share a memory pool and a stream to capture on: memory that one graph needs only while it runs serves the
    others too.
    """

    verb = "run"
    """What the model does in them."""

    def __init__(self) -> None:
        self.stopped: str | None = None
        """Why nothing runs as a graph any more."""
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._seen: Counter[Any] = Counter()
        """How often a graph would have been of use."""
        self._state: tuple[Any, ...] = ()
        self._others: OrderedDict[Any, Any] = OrderedDict()
        """The graphs of another state: evaluation and training take turns."""
        self._pool: Any = None
        self._stream: Any = None
        self._capture_stream: Any = None
        self.lock = threading.RLock()
        """Held while a graph is loaded, replayed or captured."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # another process, or a copy of the model, captures its own

    def __len__(self) -> int:
        return len(self._graphs)

    def close(self) -> None:
        """Frees the graphs; no others are made."""
        with self.lock:
            self.stopped = "the model is not used any more"
            self._forget()

    def forget(self) -> bool:
        """Frees the graphs. False: there were none."""
        with self.lock:
            some = bool(self._graphs)
            self._forget()
        return some

    def _forget(self) -> None:
        self._graphs, self._seen = OrderedDict(), Counter()
        self._others.clear()
        self._state, self._pool = (), None

    def _is_current(self, model: Any, device: torch.device) -> bool:
        """Whether a graph would do what the model does now."""
        state = model_state(model, device)
        if state and state != self._state:
            if self._state:
                self._others[self._state] = self._graphs, self._seen
            self._graphs, self._seen = self._others.pop(state, None) or (OrderedDict(), Counter())
            while len(self._others) > OTHER_STATES:
                self._others.popitem(last=False)
            self._state = state
        return bool(state)

    def _stop(self, model: Any, reason: str) -> None:
        self._forget()
        self.stopped = reason
        logger.warning("%s does not %s as CUDA graphs: %s", type(model).__name__, self.verb, self.stopped)

    def _captured(self, model: Any, device: torch.device, make: Callable[[Any, Any], Graph]) -> Graph | None:
        """What `make` captures with a pool and a stream; None: that failed, and nothing is captured any more."""
        if self._pool is None:
            self._pool = new_pool()
        if self._capture_stream is None and device.type == "cuda":
            self._capture_stream = torch.cuda.Stream(device)
        try:
            with torch.inference_mode(False):  # later calls may be made outside of it
                return make(self._pool, self._capture_stream)
        except Exception as error:
            reason = reason_of(error)
        self._stop(model, reason)  # here the error no longer holds the tensors of the failed capture
        end_failed_capture(device)
        return None

    def _wait_for_last(self, device: torch.device) -> None:
        """Another stream may still use the graphs' memory."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream


def reason_of(error: BaseException) -> str:
    """A line. The end of a failed capture raises too; what it came from is the reason."""
    cause = error.__context__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def most_memory(device: torch.device) -> float:
    """Bytes that the tensors of a model's graphs may take, without what they share."""
    return float(torch.cuda.get_device_properties(device).total_memory * MOST_MEMORY)


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def python_interferes(device: torch.device) -> bool:
    """Whether Python now wants to change or to see what is computed, which a graph would not let it."""
    return (
        torch.is_autocast_enabled(device.type)
        or torch.compiler.is_compiling()
        or torch.is_anomaly_enabled()
        or parametrize._cache_enabled > 0
        or _get_current_dispatch_mode() is not None
        or any(getattr(global_hooks, name, None) for name in GLOBAL_HOOKS)
    )


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


@contextmanager
def side_stream(stream: Any) -> Iterator[None]:
    """`stream` and the current one wait for each other. A capture that fails does not give the current one back."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        yield
    finally:
        torch.cuda.set_stream(current)
        current.wait_stream(stream)


def end_failed_capture(device: torch.device) -> None:
    """A capture that failed leaves the random numbers of the device unusable until another one has succeeded."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)


def model_state(model: Any, device: torch.device) -> tuple[Any, ...]:
    """What a graph of a model depends on; empty: a graph would not do what the model does.

    A graph has the addresses of the weights and the numbers that Python had, and calls no Python: no hook, no other
    ``forward``, no random choice of layers.
    """
    config = model.config.get_text_config()
    facts: list[Any] = [torch.are_deterministic_algorithms_enabled(), float32_precision(device), *_kernels()]
    facts += _numbers(vars(config))
    facts.append(config._attn_implementation)
    waiting = [model]
    while waiting:  # every batch and every new token waits for this: `modules()` takes twice as long
        module = waiting.pop()
        own = module.__dict__
        waiting += [part for part in own["_modules"].values() if part is not None]
        for name in HOOKS:
            if own[name] and not all(map(_harmless, own[name].values())):
                return ()
        if own.get("_compiled_call_impl") is not None or (own["training"] and own.get("gradient_checkpointing")):
            return ()
        if "forward" in own and getattr(own["forward"], HARMLESS_ATTRIBUTE, False) is not True:
            return ()
        facts += (id(module), own["training"])
        if not type(module).__module__.startswith("torch.nn."):
            facts += _numbers(own)
            facts += adapter_state(module)
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if tensor.requires_grad or tensor.device != device:
                    return ()
                facts.append(tensor.data_ptr() or id(tensor))  # a quantised tensor has no address of its own
    if model.training and draws_random_numbers(model):
        return ()
    return tuple(facts)


def _numbers(values: dict[str, Any]) -> list[Any]:
    """Those of an object's attributes that Python computes with, such as the scale of an attention's scores."""
    return [value for value in values.values() if type(value) in (float, int, bool, str)]


def _kernels() -> list[bool]:
    """Which kernels a scaled dot product attention may use."""
    backends = torch.backends.cuda
    return [
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    ]


def _harmless(hook: Any) -> bool:
    ours: bool = getattr(hook, HARMLESS_ATTRIBUTE, False) is True
    return ours or getattr(hook, "__module__", "").startswith("transformers.")
