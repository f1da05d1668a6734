"""One step of ``generate`` on a GPU as a CUDA graph: one launch for the next token of every row.

A graph holds a cache of a fixed width, longer than the text. It writes each token's keys and values at a place that a
tensor holds, and its mask hides what lies behind that place. So one graph serves all lengths up to its width. A call of
``generate`` moves its cache into the graph's tensors, which are its cache from then on (``compiled/decoding.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.attention import CARRIER_ATTRIBUTE
from ..hf.cuda_graphs import side_stream
from .cache import CompiledCache, Layer, RowPlaces, additive_mask

if TYPE_CHECKING:
    from .decoding import Decoding

Forward = Callable[..., Any]


class FixedPlaces(RowPlaces):
    """Places that lie in tensors which each step fills anew."""

    def __init__(self, like: RowPlaces, slots: int, device: torch.device) -> None:
        layers, two, _, heads, size = like.compiled.shape
        rows = len(like.padding)
        super().__init__(
            like.compiled.new_empty(layers, two, 0, heads, size), like.prefixes.new_zeros(rows, 2), like.padding
        )
        self.slots = slots
        self.virtual, self.pads = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.front = torch.zeros(1, dtype=torch.int64, device=device)
        """Slots of the prompts."""
        self.length = torch.zeros_like(self.front)
        """Tokens before the new one."""

    def begin(self) -> None:
        self._made.clear()

    @property
    def slot(self) -> Tensor:
        """[1], where the new token's keys and values are written."""
        made: Tensor = self._once("slot", None, lambda: self.front + self.length)
        return made

    def mask(self, width: int, length: int, new: int, window: int, like: Tensor) -> Tensor:
        def make() -> Tensor:
            return additive_mask(
                self.virtual, self.pads, self.front, self.length + 1, self.slots, 1, window, like.dtype
            )

        made: Tensor = self._once(f"mask of window {window}", like.dtype, make)
        return made


class FixedLayer(Layer):
    """A layer of one size. A pass writes one token and reads all slots, which the mask hides as needed."""

    def __init__(self, rows: FixedPlaces, index: int, stored: list[Tensor]) -> None:
        super().__init__(rows, index)
        self.places = rows
        self.holds_prompts, self._new, self.updates = True, 1, 0
        self.hold(stored, rows.slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.updates += 1
        self.was_read = False
        for stored, states in zip(self.stored, (key_states, value_states), strict=True):
            stored.index_copy_(1, self.places.slot, states.transpose(1, 2))
        keys, values = (stored.transpose(1, 2) for stored in self.stored)
        setattr(keys, CARRIER_ATTRIBUTE, self)
        return keys, values


class DecodeGraph:
    """One step of a batch: the logits after a token per row, and its keys and values in the cache."""

    def __init__(self, key: tuple[Any, ...], cache: CompiledCache, width: int, device: torch.device) -> None:
        """`width`: slots of a row, for its prompt and its text."""
        layers = cache.layers
        self.key, self.width = key, width
        self.places = FixedPlaces(layers[0].rows, width, device)
        rows = len(self.places.padding)
        self.ids, self.positions = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(rows, 1, 1, width)
        self.cache = CompiledCache(self.places)
        self.cache.layers = [
            FixedLayer(self.places, i, [x.new_zeros(rows, width, *x.shape[2:]) for x in layer.stored])
            for i, layer in enumerate(layers)
        ]
        self.logits: Tensor
        self.output_type: type[Any]
        self.cache_name: str
        self._rows: RowPlaces | None = None
        self._owner: weakref.ref[Decoding] | None = None
        self._graph: Any = None

    @property
    def in_use(self) -> bool:
        owner = None if self._owner is None else self._owner()
        return owner is not None and owner.graph is self

    @property
    def nbytes(self) -> int:
        """Of its keys and values."""
        return sum(stored.nbytes for layer in self.cache.layers for stored in layer.stored)

    def take(self, owner: Decoding, cache: CompiledCache) -> None:
        """Moves a cache into the tensors of this graph."""
        end = cache.layers[0].front + cache.layers[0].length
        for own, layer in zip(self.cache.layers, cache.layers, strict=True):
            for to, stored in zip(own.stored, layer.stored, strict=True):
                to[:, :end].copy_(stored[:, :end])
                to[:, end:].zero_()  # what is hidden must be finite all the same
            layer.hold(own.stored, layer.length)
        rows = self._rows = cache.layers[0].rows
        virtual, padding = rows.on(self.ids.device)
        self.places.virtual.copy_(virtual)
        self.places.pads.copy_(padding)
        self.places.front.fill_(cache.layers[0].front)
        owner.graph, self._owner = self, weakref.ref(owner)

    def holds(self, cache: CompiledCache) -> bool:
        """Whether a cache still is what this graph reads: not reordered, repeated, selected, grown or emptied."""
        first = cache.layers[0]
        return all(
            layer.stored is own.stored and layer.rows is self._rows and layer.length == first.length and layer.was_read
            for own, layer in zip(self.cache.layers, cache.layers, strict=True)
        )

    def has_room(self, cache: CompiledCache) -> bool:
        return cache.layers[0].front + cache.layers[0].length < self.width

    def load(self, ids: Tensor, positions: Tensor, cache: CompiledCache) -> None:
        """Takes the tokens [B, 1] that follow the text of a cache, and their positions."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.places.length.fill_(cache.layers[0].length)

    def release(self) -> None:
        """Ends a call's use of this graph."""
        self._rows = self._owner = None

    def capture(self, forward: Forward, pool: Any, stream: Any) -> None:
        """Records the step that is loaded."""
        with side_stream(stream):
            with torch.cuda.stream(stream):  # a first run lets libraries allocate what they work in
                self.forward_pass(forward)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as a loader's that pins memory, go on meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.logits = self.forward_pass(forward)

    @torch.no_grad()
    def forward_pass(self, forward: Forward) -> Tensor:
        """[B, 1, V]"""
        layers: list[Any] = self.cache.layers
        self.places.begin()
        for layer in layers:
            layer.updates = 0
        output = forward(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask=self.marker,
            use_cache=True,
            return_dict=True,
            **{self.cache_name: self.cache},
        )
        if not all(layer.updates == 1 and layer.was_read for layer in layers):
            raise Unsupported("its attention does not read what it has cached")
        further = [name for name, value in output.items() if name != "logits" and value is not self.cache]
        if further:
            raise Unsupported(f"its output has {', '.join(further)} beside logits")
        self.output_type = type(output)
        logits: Tensor = output.logits
        return logits

    def replay(self) -> Tensor:
        """[B, 1, V] of the step that is loaded."""
        self._graph.replay()
        return self.logits.clone()
