"""Which steps of ``generate`` on a GPU are replayed as CUDA graphs, and which the model runs itself.

Whatever is not a plain step, and every step of a cache that was rearranged since a graph took it, runs as usual.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..hf.architecture import cache_keyword
from ..hf.cuda_graphs import (
    HARMLESS_ATTRIBUTE,
    MORE_OUTPUT,
    MOST_GRAPHS,
    ModelGraphs,
    most_memory,
    on_gpu,
    python_interferes,
)
from ..hf.generation_options import setting
from ..packed.self_check import SLACK, tolerance
from .cache import GROWTH, CompiledCache, Layer, compiled_cache
from .decode_graph import DecodeGraph, Forward

logger = logging.getLogger("softprompt_fast")
EAGER_STEPS = 1
"""Steps of a call that run as usual before one is captured: rows may end at once."""
LEAST_LEFT = 8
"""Tokens that must be to come: a capture takes about three steps, and the first graph is compared twice."""
HORIZON = 256
"""Tokens to come for which a graph has room at most; attention reads all of its slots."""
CHECKED_STEPS = 2
"""Replays of the first graph that are compared with the model itself, at two places."""
DEFAULT_NEW_TOKENS = 20
"""Those of transformers' ``generate``."""
REARRANGING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
"""Options with which a cache is shortened, or kept by somebody else."""
IGNORED = {
    "input_ids",
    "position_ids",
    "attention_mask",
    "cache_position",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
"""Arguments of a forward that add nothing to what a graph is given: the mask and the length are in the cache."""


class Decoding:
    """The steps of one call of ``generate``.

    Args:
        limit: the length of text, with its padding, at which the call ends at the latest.
        check: compare the first replays with the model itself.
    """

    def __init__(self, graphs: DecodeGraphs, model: Any, limit: int, check: bool) -> None:
        self.graphs, self.model, self.limit, self.check = graphs, model, limit, check
        self.steps = 0
        self.finished = False
        """No further step runs as a graph."""
        self.graph: DecodeGraph | None = None
        """The graph that the cache was moved into: no other call may use it."""

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copied cache has tensors of its own

    def step(self, forward: Forward, cache: CompiledCache, keywords: dict[str, Any]) -> Any:
        """The output of the model's `forward`; None: this step runs as usual, by the caller."""
        if self.finished or self.graphs.stopped is not None or not self._plain(keywords):
            return None
        return self.graphs.run(self, forward, cache, keywords)

    def _plain(self, keywords: dict[str, Any]) -> bool:
        """Whether a call asks for the logits after one token per row, and for nothing else."""
        ids, mask, positions = (keywords.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        further = (v for k, v in keywords.items() if k not in IGNORED and not isinstance(v, CompiledCache))
        config = self.model.config.get_text_config()
        return (
            isinstance(ids, Tensor)
            and isinstance(positions, Tensor)
            and ids.shape == positions.shape == (len(ids), 1)
            and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
            and keywords.get("use_cache") is True
            and keywords.get("return_dict") is not False
            and isinstance(keywords.get("logits_to_keep", 0), int)
            and all(value is None or value is False for value in further)
            and not any(getattr(config, name, False) for name in MORE_OUTPUT)
            and on_gpu(ids.device)
            and not torch.is_grad_enabled()
            and not python_interferes(ids.device)
        )

    def end(self, cache: CompiledCache, cache_is_returned: bool) -> None:
        """Gives the graph back. A cache that the caller gets has tensors of its own."""
        graph, self.finished, cache.decoding = self.graph, True, None
        for i, layer in enumerate(cache.layers):
            if graph is not None and layer.stored is graph.cache.layers[i].stored:
                end = layer.front + layer.length
                own = [x[:, :end].clone() for x in layer.stored] if cache_is_returned else layer.stored
                layer.hold(own, layer.length)
        if graph is not None:
            graph.release()
        self.graph = None


class DecodeGraphs(ModelGraphs[DecodeGraph]):
    """The graphs of one model's steps."""

    verb = "decode"
    graph_type: type[DecodeGraph] = DecodeGraph

    def __init__(self) -> None:
        super().__init__()
        self._unchecked = CHECKED_STEPS

    def _forget(self) -> None:
        super()._forget()
        self._unchecked = CHECKED_STEPS

    def decoding(self, model: Any, width: int, options: dict[str, Any], check: bool) -> Decoding | None:
        """For a call of ``generate`` with texts of `width` tokens, padding included; None: it runs as usual."""
        if self.stopped is not None or not on_gpu(model.device):
            return None
        if setting(model, options, "num_beams") not in (None, 1):  # every step would move the cache
            return None
        if any(setting(model, options, name) is not None for name in REARRANGING):
            return None
        new, limit = (setting(model, options, name) for name in ("max_new_tokens", "max_length"))
        if new is not None or limit is None:
            limit = width + (DEFAULT_NEW_TOKENS if new is None else new)
        return Decoding(self, model, int(limit), check)

    def run(self, decoding: Decoding, forward: Forward, cache: CompiledCache, keywords: dict[str, Any]) -> Any:
        """As :meth:`Decoding.step`."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            return self._run(decoding, forward, cache, keywords)
        finally:
            self.lock.release()

    def _run(self, decoding: Decoding, forward: Forward, cache: CompiledCache, keywords: dict[str, Any]) -> Any:
        decoding.steps += 1
        ids, positions = keywords["input_ids"], keywords["position_ids"]
        current = self._is_current(decoding.model, ids.device)
        graph = decoding.graph
        if graph is not None and self._graphs.get(graph.key) is not graph:  # the model has changed
            graph = decoding.graph = None
        if not current:
            return None
        if graph is not None and not graph.holds(cache):
            decoding.finished = True  # some of its layers may still hold the graph's tensors
            return None
        self._wait_for_last(ids.device)
        if graph is None or not graph.has_room(cache):
            graph = self._graph_for(decoding, forward, cache, ids, positions)
            if graph is None:
                return None
        graph.load(ids, positions, cache)
        if decoding.check and self._unchecked:
            return self._compared(decoding, graph, forward, keywords)
        logits = graph.replay()
        for layer in cache.layers:
            layer.length += 1
        return graph.output_type(logits=logits, **{graph.cache_name: cache})

    def _graph_for(
        self, decoding: Decoding, forward: Forward, cache: CompiledCache, ids: Tensor, positions: Tensor
    ) -> DecodeGraph | None:
        """A graph that holds the cache and has room for the next tokens; None: there is none yet."""
        first, device = cache.layers[0], ids.device
        if not first.length:
            return None  # texts of one token: the first step is theirs
        if not all(_can_move(layer, first, len(ids), device) for layer in cache.layers):
            decoding.finished = True
            return None
        left = decoding.limit - first.length
        end = first.front + first.length + max(1, min(left, HORIZON))
        width = -(-end // GROWTH) * GROWTH
        shapes = tuple((x.shape[2:], x.dtype) for layer in cache.layers for x in layer.stored)
        key = (len(ids), width, device, shapes)
        graph = self._graphs.get(key)
        if graph is None:
            if decoding.steps <= EAGER_STEPS or left < LEAST_LEFT:
                return None
            numbers = sum(x[:, 0].nbytes for layer in cache.layers for x in layer.stored) * width
            if not self._make_room(numbers, most_memory(device)):
                decoding.finished = True
                return None
            return self._new_graph(key, width, decoding, forward, cache, ids, positions)
        if graph.in_use:
            return None
        self._graphs.move_to_end(key)
        graph.take(decoding, cache)
        return graph

    def _make_room(self, needed: int, most: float) -> bool:
        """Drops graphs that were not used for the longest time until one of `needed` bytes has room too."""
        sizes = {key: graph.nbytes for key, graph in self._graphs.items()}
        used = sum(sizes.values())
        for key, size in sizes.items():
            if (used + needed > most or len(self) >= MOST_GRAPHS) and not self._graphs[key].in_use:
                del self._graphs[key]
                used -= size
        return used + needed <= most and len(self) < MOST_GRAPHS

    def _new_graph(
        self,
        key: tuple[Any, ...],
        width: int,
        decoding: Decoding,
        forward: Forward,
        cache: CompiledCache,
        ids: Tensor,
        positions: Tensor,
    ) -> DecodeGraph | None:
        """A graph that holds the cache and this step."""

        def make(pool: Any, stream: Any) -> DecodeGraph:
            graph = self.graph_type(key, cache, width, ids.device)
            graph.cache_name = cache_keyword(decoding.model)
            graph.take(decoding, cache)
            graph.load(ids, positions, cache)
            graph.capture(forward, pool, stream)
            logger.info("steps of %d rows of up to %d slots run as a CUDA graph", len(ids), width)
            return graph

        graph = self._captured(decoding.model, ids.device, make)
        if graph is None:
            decoding.graph = None
        else:
            self._graphs[key] = graph
        return graph

    def _compared(self, decoding: Decoding, graph: DecodeGraph, forward: Forward, keywords: dict[str, Any]) -> Any:
        """The output of the model itself, after the same step as a graph gave the same."""
        output = forward(**keywords)
        expected, found = output.logits[:, -1].double(), graph.replay()[:, -1].double()
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        allowed = tolerance(decoding.model, SLACK)
        self._unchecked -= 1
        if not difference <= allowed:
            decoding.graph = None
            self._stop(decoding.model, f"logits differ by {difference:.1e}, more than the tolerance {allowed:.0e}")
        return output


def _can_move(layer: Layer, first: Layer, rows: int, device: torch.device) -> bool:
    """Whether a layer is as those are that a graph copies: prompt, then text, for these rows."""
    return (
        type(layer) is Layer
        and layer.holds_prompts
        and layer.was_read
        and layer.length == first.length > 0
        and layer.front == first.front
        and len(layer.rows.padding) == rows
        and all(len(x) == rows and x.device == device for x in layer.stored)
    )


class _Forward:
    """In place of a model's forward: a step of a cache with a :class:`Decoding` may run as a graph.

    Somebody who wraps ``forward`` meanwhile keeps this in the wrapper, where it only calls the original.
    """

    def __init__(self, model: Any) -> None:
        self.users = 0
        functools.update_wrapper(self, model.forward)  # transformers reads the names of its arguments

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        original: Forward = self.__wrapped__  # type: ignore[attr-defined]
        cache = None if args else compiled_cache(keywords)
        output = None
        if cache is not None and cache.decoding is not None:
            output = cache.decoding.step(original, cache, keywords)
        return original(*args, **keywords) if output is None else output


setattr(_Forward, HARMLESS_ATTRIBUTE, True)
_installing = threading.Lock()


@contextmanager
def steps_as_graphs(model: Any) -> Iterator[None]:
    """Lets a model's forward replay graphs meanwhile, unless somebody has replaced or compiled it."""
    with _installing:
        forward = model.__dict__.get("forward")
        if forward is None and getattr(model, "_compiled_call_impl", None) is None:
            forward = model.forward = _Forward(model)
        if isinstance(forward, _Forward):
            forward.users += 1
    try:
        yield
    finally:
        if isinstance(forward, _Forward):
            with _installing:
                forward.users -= 1
                if not forward.users and model.__dict__.get("forward") is forward:
                    del model.forward
