"""A key/value cache for ``generate`` after compiled prompts: it hides the prompts, and padding is never read.

transformers sees a cache of the texts alone: its length, its mask and what it removes count text only. A layer's keys
have an attribute, the cache's layer. By it the installed attention (``hf/attention.py``) calls :meth:`Layer.attend`,
which reads each row's prompt in the table of compiled prompts and each row's text, without its padding, in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..base.errors import Unsupported
from ..hf.attention import CARRIER_ATTRIBUTE, check_keywords
from ..hf.cuda_graphs import HARMLESS_ATTRIBUTE
from ..ops.packing.functional import RowTable, unpack
from ..ops.segment_attention.functional import available, cached_attention
from ..packed.attention import compute_dtype, explicit_attention, masked_attention

if TYPE_CHECKING:
    from .decoding import Decoding

GROWTH = 64
"""Slots for later tokens that a layer allocates when it grows."""


class RowPlaces:
    """The places of a batch's rows, for all layers.

    Args:
        compiled: [L, 2, R, H', E]
        prefixes: [B, 2], first slot and length of each row's prompt in it.
        padding: [B], tokens of padding before each row's text.
    """

    def __init__(self, compiled: Tensor, prefixes: Tensor, padding: Tensor) -> None:
        self.compiled, self.prefixes, self.padding = compiled, prefixes, padding
        self._made: dict[str, tuple[Any, Any]] = {}

    def repeated(self, copies: int) -> RowPlaces:
        """Each row `copies` times, as beam search has them."""

        def make() -> RowPlaces:
            prefixes, padding = (x.repeat_interleave(copies, 0) for x in (self.prefixes, self.padding))
            return RowPlaces(self.compiled, prefixes, padding)

        made: RowPlaces = self._once("repeated", copies, make)
        return self if copies == 1 else made

    def selected(self, rows: Tensor) -> RowPlaces:
        rows = rows.cpu()
        return RowPlaces(self.compiled, self.prefixes[rows], self.padding[rows])

    def _once(self, name: str, key: Any, make: Any) -> Any:
        """The layers of one step ask for the same."""
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = (key, make())
        return self._made[name][1]

    def tables(self, length: int, room: int, new: int) -> tuple[Tensor, Tensor]:
        """For :func:`cached_attention`: `length` cached tokens in `room` slots a row, of which the last `new` ask."""

        def make() -> tuple[Tensor, Tensor]:
            row = torch.arange(len(self.padding))
            own = (length - self.padding).clamp(min=0)
            count = own.clamp(max=new)
            queries = torch.stack([row * new + new - count, count], 1)
            table = torch.stack([row * room + length - own, own], 1)
            return torch.cat([table, self.prefixes], 1).contiguous(), queries.contiguous()

        made: tuple[Tensor, Tensor] = self._once("tables", (length, room, new), make)
        return made

    def prompts(self) -> tuple[RowTable, int]:
        """The table by which each row's prompt is copied, and the length of the longest one."""

        def make() -> tuple[RowTable, int]:
            width = int(self.prefixes[:, 1].max())
            return RowTable(F.pad(self.prefixes, (2, 0)).contiguous().to(self.compiled.device), width), width

        made: tuple[RowTable, int] = self._once("prompts", None, make)
        return made

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[B] each: virtual tokens of each row's prompt, and its padding."""

        def make() -> tuple[Tensor, Tensor]:
            both = torch.stack([self.prefixes[:, 1], self.padding])
            if device.type == "cuda":
                both = both.pin_memory()
            virtual, padding = both.to(device, non_blocking=True)
            return virtual, padding

        made: tuple[Tensor, Tensor] = self._once("on", device, make)
        return made

    def mask(self, width: int, length: int, new: int, window: int, like: Tensor) -> Tensor:
        """Additive [B, 1, new, width + length] for keys ``[prompt, filled up to width][padding][text]``."""

        def make() -> Tensor:
            return additive_mask(*self.on(like.device), width, length, width + length, new, window, like.dtype)

        made: Tensor = self._once(
            f"mask of window {window}", (width, length, new, window, like.dtype, like.device), make
        )
        return made


def additive_mask(
    virtual: Tensor,
    padding: Tensor,
    width: int | Tensor,
    length: int | Tensor,
    slots: int,
    new: int,
    window: int,
    dtype: torch.dtype,
) -> Tensor:
    """[B, 1, new, slots] for keys ``[prompt, filled up to width][padding][text]`` and slots that are not filled yet.

    Args:
        virtual, padding: [B], virtual tokens and padding of each row.
        width, length: slots of prompts; tokens of padding and text, of which the last `new` ask. A tensor is on the
            device, so that nothing is computed on the host.
    """
    virtual, padding = virtual[:, None], padding[:, None]
    slot = torch.arange(slots, device=virtual.device)
    token = slot - width
    place = torch.where(token < 0, slot, token - padding + virtual)
    real = torch.where(token < 0, slot < virtual, token >= padding)
    asked = torch.arange(new, device=virtual.device) + (length - new) - padding + virtual
    distance = asked[:, :, None] - place[:, None]
    seen = real[:, None] & (distance >= 0)
    if window:
        seen &= distance < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class Layer(CacheLayerMixin):
    """The text's keys and values of one layer, stored as ``[B, front + room, H', E]``.

    Where attention reads prompts in place, `front` is 0. Elsewhere it is the longest prompt's length: each row begins
    with its prompt, which is copied there once.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, rows: RowPlaces, index: int) -> None:
        super().__init__()
        self.rows, self.index = rows, index
        self.length = self.front = 0
        self.was_read = True
        """Whether attention has read what was stored last."""
        self._new = 0
        self.stored: list[Tensor] = []
        self.holds_prompts = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.was_read:
            raise Unsupported("its attention does not read what it has cached")
        self.was_read = False
        if len(self.rows.padding) != len(key_states):
            self.batch_repeat_interleave(len(key_states) // len(self.rows.padding))
        new = key_states.shape[2]
        end = self.front + self.length
        if not self.stored or end + new > self.stored[0].shape[1]:
            self.stored = [self._larger(i, x.transpose(1, 2)) for i, x in enumerate((key_states, value_states))]
        for stored, states in zip(self.stored, (key_states, value_states), strict=True):
            stored[:, end : end + new] = states.transpose(1, 2)
        keys, values = self.hold(self.stored, self.length + new)
        self._new = new
        self.is_initialized = True
        setattr(keys, CARRIER_ATTRIBUTE, self)
        return keys, values

    def hold(self, stored: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
        """Takes tensors that hold its prompts, if any, and `length` tokens of text: the keys and values returned."""
        self.stored, self.length = stored, length
        text = slice(self.front, self.front + length)
        keys, values = (x[:, text].transpose(1, 2) for x in stored)
        self.keys, self.values = keys, values
        return keys, values

    def _larger(self, index: int, states: Tensor) -> Tensor:
        """What is stored, with room for states [B, new, H', E] and later ones."""
        rows, new, heads, size = states.shape
        end = self.front + self.length
        larger = states.new_empty(rows, end + new + GROWTH, heads, size)
        if self.stored:
            larger[:, :end] = self.stored[index][:, :end]
        return larger

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Attention of [B, H, new, E] queries -> [B, new, H, E]: in place on a CPU, else on gathered prompts."""
        check_keywords(module, is_causal, keywords)
        rows, heads, new, size = query.shape
        keys, values = self.stored
        if dropout or new != self._new or self.rows.compiled.shape[3:] != keys.shape[2:] or keys.shape != values.shape:
            raise Unsupported(f"its attention has dropout, {new} queries for {self._new} new keys, or other heads")
        self.was_read = True
        if softcap is not None or s_aux is not None or self.holds_prompts or not available(query):
            return self._attend_gathered(query, scaling, sliding_window, softcap, s_aux), None
        table, queries = self.rows.tables(self.length, keys.shape[1], new)
        prefix_key, prefix_value = self.rows.compiled[self.index].to(query.dtype).unbind(0)
        out = cached_attention(
            query.transpose(1, 2).reshape(rows * new, heads, size),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            table,
            queries,
            scale=scaling,
            window=sliding_window,
            prefix_key=prefix_key,
            prefix_value=prefix_value,
        )
        return out.view(rows, new, heads, -1), None

    def _attend_gathered(
        self, query: Tensor, scaling: float | None, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """[B, new, H, E], on one sequence of keys per row: its prompt, then its text."""
        if not self.holds_prompts:
            self._copy_prompts()
        dtype = compute_dtype(query)
        q = query.to(dtype)
        k, v = (stored[:, : self.front + self.length].transpose(1, 2).to(dtype) for stored in self.stored)
        mask = self.rows.mask(self.front, self.length, self._new, window or 0, q)
        if softcap is not None or sinks is not None:
            out = explicit_attention(q, k, v, mask, scaling, 0.0, softcap, sinks)
        else:
            out = masked_attention(q, k, v, mask, scaling)
        return out.transpose(1, 2).to(query.dtype)

    def _copy_prompts(self) -> None:
        """Puts each row's prompt before its text; zeros follow a prompt shorter than the longest one."""
        compiled, (table, width) = self.rows.compiled[self.index], self.rows.prompts()
        two, slots, heads, size = compiled.shape
        (rows,) = unpack((compiled.transpose(0, 1).reshape(slots, two, heads * size),), table)
        prompts = rows.view(len(rows), width, two, heads, size).to(self.stored[0].dtype).unbind(2)
        self.stored = [torch.cat([prompt, stored], 1) for prompt, stored in zip(prompts, self.stored, strict=True)]
        self.front, self.holds_prompts = width, True

    def get_seq_length(self, *args: Any) -> int:
        """Tokens of text and its padding; prompts do not count."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and first place of the keys that a mask is for; transformers before 5.3 passes places of queries."""
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.length + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of :meth:`get_max_length` before transformers 5.13."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; a positive number is the length to keep, as in earlier versions."""
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.length)
        self.length = max(keep, 0)

    def reset(self) -> None:
        self.length, self.front, self.stored, self.holds_prompts = 0, 0, [], False
        self.was_read = True

    def offload(self) -> None:
        """Nothing: the text of this cache stays on the model's device."""

    def prefetch(self) -> None:
        """Nothing: the text of this cache is never moved."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are reordered within a row, so prompts and padding do not change."""
        self.stored = [stored.index_select(0, beam_idx.to(stored.device)) for stored in self.stored]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = self.rows.repeated(repeats)
        self.stored = [stored.repeat_interleave(repeats, 0) for stored in self.stored]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows = self.rows.selected(indices)
        self.stored = [stored[indices] for stored in self.stored]


class CompiledCache(Cache):  # type: ignore[misc]
    """A layer for each layer of the compiled prompts.

    Args:
        first: the number that the model gives a row's first position.
    """

    layers: list[Layer]  # type: ignore[assignment]
    decoding: Decoding | None = None
    """Runs single tokens as a CUDA graph; None: the model always runs itself."""

    def __init__(self, rows: RowPlaces, first: int = 0) -> None:
        super().__init__(layers=[Layer(rows, index) for index in range(rows.compiled.shape[0])])
        self.first = first

    def positions(self, input_ids: Tensor) -> Tensor:
        """[N, new], the positions of tokens that come next; 0 for padding. N may be a multiple of the rows."""
        layer = self.layers[0]
        rows, new = layer.rows.repeated(len(input_ids) // len(layer.rows.padding)), input_ids.shape[1]
        virtual, padding = rows.on(input_ids.device)
        own = torch.arange(layer.length, layer.length + new, device=input_ids.device) - padding[:, None]
        return (own + virtual[:, None] + self.first).masked_fill(own < 0, 0)


def place_after_prompts(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A hook before a model's forward: tokens on a :class:`CompiledCache` get positions after their prompts."""
    cache, ids = compiled_cache(keywords), keywords.get("input_ids")
    if cache is None or ids is None:
        return None
    return args, keywords | {"position_ids": cache.positions(ids)}


setattr(place_after_prompts, HARMLESS_ATTRIBUTE, True)


def compiled_cache(keywords: dict[str, Any]) -> CompiledCache | None:
    """The cache among the arguments of a model's forward; its name depends on the version of transformers."""
    return next((value for value in keywords.values() if isinstance(value, CompiledCache)), None)
