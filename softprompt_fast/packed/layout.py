"""Where the segments of a packed batch are, as attention needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.attention import ATTRIBUTE
from .attention import packed_attention


@dataclass(eq=False)
class RowGroup:
    """Rows that attend in one call: a table for :func:`unpack`, and the sizes it needs on the host."""

    table: Tensor
    """[rows, 4]: first slot and length of a row's own part, first slot and length of its prefix."""
    query_table: Tensor
    """The same without prefixes."""
    result_table: Tensor
    """That again, counted from the group's first slot."""
    first_slot: int
    slots: int
    """Slots of all own parts together; they stand next to each other."""
    queries: int
    """Longest own part."""
    keys: int
    """Longest prefix + own part."""
    prefixes: list[int]
    """Prefix lengths, on the host."""
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    _behind: tuple[int, Tensor] | None = None

    @classmethod
    def of(
        cls, first_slot: int, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]], device: torch.device
    ) -> RowGroup:
        """Rows of these lengths, one after the other from `first_slot` on; a prefix is (first slot, length)."""
        starts = list(accumulate(lengths, initial=0))
        slots = starts.pop()
        lines = [
            [(first_slot + s, n, *prefix) for s, n, prefix in zip(starts, lengths, prefixes, strict=True)],
            [(first_slot + s, n, 0, 0) for s, n in zip(starts, lengths, strict=True)],
            [(s, n, 0, 0) for s, n in zip(starts, lengths, strict=True)],
        ]
        tables = torch.tensor(lines, dtype=torch.int64).view(3, -1, 4)
        if device.type == "cuda":
            tables = tables.pin_memory()
        keys = max((n + prefix[1] for n, prefix in zip(lengths, prefixes, strict=True)), default=0)
        table, query_table, result_table = tables.to(device, non_blocking=True).unbind()
        return cls(
            table=table,
            query_table=query_table,
            result_table=result_table,
            first_slot=first_slot,
            slots=slots,
            queries=max(lengths, default=0),
            keys=keys,
            prefixes=[length for _, length in prefixes],
        )

    def behind(self, slots: int) -> Tensor:
        """The table if `slots` others, which prefixes lie in, stand in front of the batch's own."""
        if not slots:
            return self.table
        if self._behind is None or self._behind[0] != slots:
            self._behind = (slots, self.table + torch.tensor([slots, 0, 0, 0], device=self.table.device))
        return self._behind[1]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive ``[rows or 1, 1, queries, keys]``: query i stands at key prefix + i and sees what is not behind it.

        Padding stands behind every row, so only padding sees it. Built once per batch, not once per layer.
        """
        key = (window or 0, dtype)
        if key not in self.masks:
            device = self.table.device
            alike = len(set(self.prefixes)) <= 1
            prefix = self.table[:1, 3] if alike else self.table[:, 3]
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
    """What attention must know of a packed batch."""

    prompts: RowGroup
    rows: RowGroup
    compiled: Tensor | None = None
    """[L, 2, R, H', E]: keys and values of prompts per layer, computed before; prefixes of rows are slots of it."""
    capture: Tensor | None = None
    """[L, 2, K, H', E]: takes the keys and values that this batch computes."""
    calls: int = 0
    windows: set[int] = field(default_factory=set)
    _compiled_layers: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if self.compiled is not None:  # at once: indexing layer by layer, each gradient would be as large as all
            self._compiled_layers = self.compiled.unbind(0)

    @property
    def slots(self) -> int:
        """K"""
        return self.prompts.slots + self.rows.slots

    @cached_property
    def table(self) -> Tensor:
        """[prompts + rows, 4]: of all segments, for :func:`segment_attention`."""
        return torch.cat([self.prompts.table, self.rows.table])

    def compiled_for(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys [R, H', E] and values of compiled prompts in a module's layer."""
        if self.compiled is None:
            return None
        _check_cache_shape(module, self.compiled, key, value)
        keys, values = self._compiled_layers[module.layer_idx].unbind(0)
        return keys.to(key.dtype), values.to(value.dtype)

    def keep(self, module: Any, key: Tensor, value: Tensor) -> None:
        assert self.capture is not None
        _check_cache_shape(module, self.capture, key, value)
        self.capture[module.layer_idx, 0] = key
        self.capture[module.layer_idx, 1] = value

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """What ``hf/attention.py`` calls for a batch that carries this layout."""
        return packed_attention(self, module, query, key, value, **options)

    def marker(self, device: torch.device) -> Tensor:
        """The mask that carries this layout."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        setattr(mask, ATTRIBUTE, self)
        return mask


def _check_cache_shape(module: Any, cache: Tensor, key: Tensor, value: Tensor) -> None:
    layer = getattr(module, "layer_idx", None)
    if layer is None or not 0 <= layer < cache.shape[0]:
        raise Unsupported(f"its attention layers are not numbered 0 to {cache.shape[0] - 1}, got {layer}")
    for tensor in (key, value):
        if tensor.shape[1:] != cache.shape[3:]:
            shapes = f"{list(cache.shape[3:])}, got {list(tensor.shape[1:])} in layer {layer}"
            raise Unsupported(f"its layers have different heads: {shapes}")
