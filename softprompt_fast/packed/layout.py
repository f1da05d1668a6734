"""Where the segments of a packed batch are: the facts that attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..base.compiling import outside_of_graphs
from ..base.errors import Unsupported
from ..hf.attention import CARRIER_ATTRIBUTE, HANDLE_ATTRIBUTE
from ..ops.extension.contract import TableColumn
from ..ops.packing.functional import RowTable
from ..ops.segment_attention.ragged import Line, RaggedPlan
from .attention import Observer, packed_attention
from .traced_attention import layout_handle, traced_attention


@dataclass(eq=False)
class RowGroup:
    """Rows that attend in one call: a table for :func:`unpack`, and the sizes that it needs on the host."""

    table: Tensor
    """[rows, 4]: first slot and length of a row's own part, first slot and length of its prefix."""
    query_rows: RowTable
    """The same rows without prefixes."""
    result_rows: RowTable
    """The same as ``query_rows``, with slots counted from the group's first slot."""
    first_slot: int
    slots: int
    """Slots of all own parts together; they are contiguous."""
    queries: int
    """Longest own part."""
    keys: int
    """Longest prefix + own part."""
    lines: list[Line]
    """``table`` on the host."""
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    _key_rows: tuple[int, RowTable] | None = None

    @classmethod
    def of(
        cls, first_slot: int, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]], device: torch.device
    ) -> RowGroup:
        """Rows of these lengths, one after the other from `first_slot` on; a prefix is (first slot, length)."""
        starts = list(accumulate(lengths, initial=0))
        slots = starts.pop()
        tables = [
            [(first_slot + s, n, *prefix) for s, n, prefix in zip(starts, lengths, prefixes, strict=True)],
            [(first_slot + s, n, 0, 0) for s, n in zip(starts, lengths, strict=True)],
            [(s, n, 0, 0) for s, n in zip(starts, lengths, strict=True)],
        ]
        moved = torch.tensor(tables, dtype=torch.int64).view(3, -1, 4)
        if device.type == "cuda":
            moved = moved.pin_memory()
        queries = max(lengths, default=0)
        keys = max((n + prefix[1] for n, prefix in zip(lengths, prefixes, strict=True)), default=0)
        table, query_table, result_table = moved.to(device, non_blocking=True).unbind()
        return cls(
            table=table,
            query_rows=RowTable(query_table, queries),
            result_rows=RowTable(result_table, queries),
            first_slot=first_slot,
            slots=slots,
            queries=queries,
            keys=keys,
            lines=tables[0],
        )

    @property
    def prefixes(self) -> list[int]:
        """Prefix lengths, on the host."""
        return [length for *_, length in self.lines]

    def key_rows(self, slots: int) -> RowTable:
        """The rows of keys and values that begin with `slots` other slots, which contain the prefixes."""
        if self._key_rows is None or self._key_rows[0] != slots:
            table = self.table.clone() if slots else self.table
            if slots:
                table[:, TableColumn.OWN_SLOT] += slots
            self._key_rows = (slots, RowTable(table, self.keys))
        return self._key_rows[1]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive ``[rows or 1, 1, queries, keys]``: query i is at key prefix + i and sees this key and earlier ones.

        Padding comes after each row's own tokens, so only padding sees it. Built once per batch, not once per layer.
        """
        key = (window or 0, dtype)
        if key not in self.masks:
            device = self.table.device
            same = len(set(self.prefixes)) <= 1
            prefix = self.table[:1, 3] if same else self.table[:, 3]
            query = torch.arange(self.queries, device=device) + prefix[:, None]
            distance = query[:, :, None] - torch.arange(self.keys, device=device)
            seen = distance >= 0
            if window:
                seen &= distance < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            self.masks[key] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return self.masks[key]


@dataclass(eq=False)
class PackedLayout:
    """The facts about a packed batch that attention needs."""

    prompts: RowGroup
    rows: RowGroup
    compiled: Tensor | None = None
    """[L, 2, R, H', E]: keys and values of prompts per layer, computed earlier; the rows' prefixes are slots of it."""
    capture: Tensor | None = None
    """[L, 2, K, H', E]: attention writes the keys and values of this batch here."""
    observer: Observer | None = None
    """Called in every layer, before its attention."""
    calls: int = 0
    """Attention calls with this layout."""
    windows: set[int] = field(default_factory=set)
    """Sliding windows of these calls."""
    attention: Any = None
    """Keeps the installed attention in place until the backward pass of this batch has run."""
    _compiled_layers: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if self.compiled is not None:  # one unbind: a gradient per indexed layer would be as large as all layers
            self._compiled_layers = self.compiled.unbind(0)

    @property
    def slots(self) -> int:
        """K"""
        return self.prompts.slots + self.rows.slots

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """What attends in one call each, where nothing attends to all segments at once."""
        return self.prompts, self.rows

    @cached_property
    def table(self) -> Tensor:
        """[prompts + rows, 4], all segments, for :func:`segment_attention`."""
        return torch.cat([self.prompts.table, self.rows.table])

    @cached_property
    def ragged(self) -> RaggedPlan | None:
        """All segments, for :func:`varlen_attention`."""
        compiled = None if self.compiled is None else self.compiled.shape[2]
        return RaggedPlan.of([*self.prompts.lines, *self.rows.lines], self.rows.table.device, compiled)

    def compiled_states(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys [R, H', E] and values of compiled prompts in a module's layer."""
        if self.compiled is None:
            return None
        _check_cache_shape(getattr(module, "layer_idx", None), self.compiled, key, value)
        keys, values = self._compiled_layers[module.layer_idx].unbind(0)
        return keys.to(key.dtype), values.to(value.dtype)

    def store_captured(self, layer: int | None, key: Tensor, value: Tensor) -> None:
        """Writes the keys and values of a layer into ``capture``."""
        assert self.capture is not None
        layer = _check_cache_shape(layer, self.capture, key, value)
        self.capture[layer, 0] = key
        self.capture[layer, 1] = value

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Attention of a batch that carries this layout; called by ``hf/attention.py``."""
        return packed_attention(self, module, query, key, value, **options)

    def attend_traced(
        self, handle: Tensor, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """The same while torch.compile traces the model; `handle` is the tensor at the marker's HANDLE_ATTRIBUTE."""
        return traced_attention(self, handle, module, query, key, value, **options)

    @outside_of_graphs
    def marker(self, device: torch.device) -> Tensor:
        """The mask that carries this layout. Any other attention fails at its shape, so it never returns a result."""
        size = self.slots + 1
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, size, size)
        setattr(mask, CARRIER_ATTRIBUTE, self)
        setattr(mask, HANDLE_ATTRIBUTE, layout_handle(self))
        return mask


def _check_cache_shape(layer: int | None, cache: Tensor, key: Tensor, value: Tensor) -> int:
    """The number of a layer that the cache [L, 2, ...] has.

    Raises:
        Unsupported: it has no such layer, or other sizes.
    """
    if layer is None or not 0 <= layer < cache.shape[0]:
        raise Unsupported(f"its attention layers are not numbered 0 to {cache.shape[0] - 1}, got {layer}")
    for tensor in (key, value):
        if tensor.shape[1:] != cache.shape[3:]:
            shapes = f"{list(cache.shape[3:])}, got {list(tensor.shape[1:])} in layer {layer}"
            raise Unsupported(f"its layers have different heads: {shapes}")
    return layer
