"""A key/value cache for ``generate`` after compiled prompts: prompts are not copied, padding is never read.

transformers asks a layer's cache for all keys and values and passes them to attention. Here the keys have an attribute,
the cache's layer. By it the installed attention (``hf/attention.py``) calls :meth:`Layer.attend`, which reads keys and
values in place: each row's prompt in the table of compiled prompts, each row's text, without its padding, in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..base.errors import Unsupported
from ..hf.attention import CARRIER_ATTRIBUTE, check_keywords
from ..ops.segment_attention.functional import available, cached_attention

GROWTH = 64
"""Slots for later tokens that a layer allocates when it grows."""


class RowPlaces:
    """The places of a batch's rows, for all layers.

    Args:
        compiled: [L, 2, R, H', E]
        prefixes: first slot and length of each row's prompt in it.
        padding: tokens of padding before each row's text.
    """

    def __init__(self, compiled: Tensor, prefixes: Sequence[tuple[int, int]], padding: Sequence[int]) -> None:
        self.compiled = compiled
        self.width = max((count for _, count in prefixes), default=0)
        self._prefixes = torch.tensor(prefixes, dtype=torch.int64).view(-1, 2)
        self._padding = torch.tensor(padding, dtype=torch.int64)
        self._made: tuple[tuple[int, int, int], tuple[Tensor, Tensor]] | None = None

    def tables(self, length: int, room: int, new: int) -> tuple[Tensor, Tensor]:
        """For :func:`cached_attention`: `length` cached tokens in `room` slots a row, of which the last `new` ask."""
        key = (length, room, new)
        if self._made is None or self._made[0] != key:
            row = torch.arange(len(self._padding))
            own = torch.stack([row * room + self._padding, length - self._padding], 1)
            count = torch.minimum(length - self._padding, torch.tensor(new))
            queries = torch.stack([row * new + new - count, count], 1)
            self._made = (key, (torch.cat([own, self._prefixes], 1).contiguous(), queries.contiguous()))
        return self._made[1]


class Layer(CacheLayerMixin):
    """The text's keys and values of one layer, ``[B, room, H', E]``."""

    is_sliding = False

    def __init__(self, rows: RowPlaces, index: int) -> None:
        super().__init__()
        self.rows, self.index = rows, index
        self.length = 0
        self._new = 0
        self._was_read = True
        self._stored: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._was_read:
            raise Unsupported("its attention does not read what it has cached")
        self._was_read = False
        new = key_states.shape[2]
        if not self._stored or self.length + new > self._stored[0].shape[1]:
            self._grow(key_states, value_states)
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored[:, self.length : self.length + new] = states.transpose(1, 2)
        self.length += new
        self._new = new
        self.is_initialized = True
        keys, values = (stored[:, : self.length].transpose(1, 2) for stored in self._stored)
        setattr(keys, CARRIER_ATTRIBUTE, self)
        return keys, values

    def _grow(self, *states: Tensor) -> None:
        before = self._stored
        self._stored = []
        for i, x in enumerate(states):
            rows, heads, new, size = x.shape
            larger = x.new_empty(rows, self.length + new + GROWTH, heads, size)
            if before:
                larger[:, : self.length] = before[i][:, : self.length]
            self._stored.append(larger)

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
        """Attention of [B, H, new, E] queries -> [B, new, H, E]; keys and values are read where they are stored."""
        self._was_read = True
        check_keywords(module, is_causal, keywords)
        if softcap is not None or s_aux is not None or dropout or not available(query):
            raise Unsupported("its attention has soft caps, sinks or dropout, or the kernel does not run here")
        rows, heads, new, size = query.shape
        keys, values = self._stored
        if new != self._new or self.rows.compiled.shape[3:] != keys.shape[2:] or keys.shape != values.shape:
            raise Unsupported(f"its attention got {new} queries for {self._new} new keys, or other heads")
        table, queries = self.rows.tables(self.length, keys.shape[1], new)
        prefix_key, prefix_value = self.rows.compiled[self.index].unbind(0)
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

    def get_seq_length(self) -> int:
        return self.rows.width + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are reordered within a row, so prompts and padding do not change."""
        self._stored = [stored.index_select(0, beam_idx) for stored in self._stored]


def compiled_cache(rows: RowPlaces) -> Cache:
    """A cache with a layer for each layer of the compiled prompts."""
    return Cache(layers=[Layer(rows, index) for index in range(rows.compiled.shape[0])])
