"""Attention over the packed layout, as an attention implementation of transformers.

The packed batch is one sequence ``[prompt a][prompt b]..[text of row 0][text of row 1]..``. Each prompt attends to
itself; each row's text to its prompt and to itself. What the batch looks like travels as an attribute of a 4-D
attention mask, which transformers hands from the model's arguments to its attention untouched, also when gradient
checkpointing runs a layer a second time. Any other mask goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import segment_attention
from .packing import pack, unpack

PREFIX = "softprompt_fast_"
ATTRIBUTE = "_softprompt_fast_layout"
# Keywords that change nothing here: positions are in q and k already, nothing is cached, nothing is returned.
IGNORED = {"position_ids", "use_cache", "cache_position", "num_items_in_batch", "return_dict", "logits_to_keep"}
IGNORED |= {"output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "tokenizer"}


# What an implementation of transformers leaves out of the model's own formula; equal to it means leaving it out too.
IGNORED_BY = {"sdpa": {"softcap", "s_aux"}}


class Unsupported(RuntimeError):
    """The packed layout cannot be run exactly here; the message says why."""


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


Attention = Callable[..., tuple[Tensor, Tensor | None]]


def packed_attention(
    layout: PackedLayout,
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
    """Attention of [1, H, K, E] queries with [1, H', K, E] keys and [1, H', K, E'] values -> [1, K, H, E']."""
    check_keywords(module, is_causal, keywords)
    if query.shape[0] != 1 or query.shape[2] != layout.slots or key.shape[2] != layout.slots:
        raise Unsupported(f"its attention got {list(query.shape)} queries for {layout.slots} packed slots")
    layout.calls += 1
    if sliding_window:
        layout.windows.add(sliding_window)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # what autocast would do to SDPA's arguments
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [K, heads, size]
    if layout.capture is not None:
        layout.keep(module, packed[1], packed[2])
    prefix = layout.compiled_for(module, packed[1], packed[2])
    with torch.autocast(device, enabled=False):
        if segment_attention.available(query) and not dropout and softcap is None and s_aux is None:
            out = segment_attention.segment_attention(
                packed[0],
                packed[1],
                packed[2],
                layout.table,
                scale=scaling,
                window=sliding_window,
                prefix_key=prefix[0] if prefix else None,
                prefix_value=prefix[1] if prefix else None,
            )
            return out[None], None
        before = 0
        if prefix is not None:  # one sequence of compiled and own slots
            before = prefix[0].shape[0]
            packed[1:] = [torch.cat([a, b]) for a, b in zip(prefix, packed[1:], strict=True)]
        parts = [
            _attend(
                group,
                packed,
                before,
                scaling=scaling,
                dropout=dropout,
                window=sliding_window,
                softcap=softcap,
                sinks=s_aux,
            )
            for group in (layout.prompts, layout.rows)
            if group.slots
        ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def check_keywords(module: Any, is_causal: bool | None, keywords: dict[str, Any]) -> None:
    """Raises Unsupported for attention that is not causal, or is told something that is not known here."""
    unknown = sorted(k for k, v in keywords.items() if k not in IGNORED and v is not None and v is not False)
    if unknown:
        raise Unsupported(f"its attention uses a keyword unknown here: {', '.join(unknown)}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise Unsupported("its attention is not causal")


def _attend(
    group: RowGroup,
    packed: list[Tensor],
    before: int,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[slots, H, E'], the results of a group's own parts; `before`: slots in front of its own in keys and values."""
    query, key, value = packed
    dtype = compute_dtype(query)
    alone = len(group.prefixes) == 1 and not group.prefixes[0] and not before  # one row: it lies there as it is
    if alone:
        q, k, v = (x[None, group.first_slot : group.first_slot + group.slots].to(dtype) for x in packed)
    else:
        (q,) = unpack((query,), group.query_table, group.queries, dtype)
        k, v = unpack((key, value), group.behind(before), group.keys, dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    plain = not any(group.prefixes) and (not window or window >= group.keys)
    mask = None if plain and softcap is None and sinks is None else group.mask(window, dtype)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, **_grouped(q, k)
        )
    else:
        assert mask is not None
        out = _explicit_attention(q, k, v, mask, scaling, dropout, softcap, sinks)
    out = out.transpose(1, 2)
    if alone:
        return out[0].to(query.dtype)
    return pack((out,), group.result_table, group.slots, query.dtype)[0]


def compute_dtype(query: Tensor) -> torch.dtype:
    """float32 on a CPU: SDPA's backward takes 2.8 times as long there in bfloat16."""
    return torch.float32 if query.device.type == "cpu" and query.dtype.itemsize == 2 else query.dtype


def _grouped(query: Tensor, key: Tensor) -> dict[str, bool]:
    return {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft-capped score (Gemma 2) or a sink per head (gpt-oss), neither of which SDPA has."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


def install(model: Any) -> None:
    """Lets a model run packed batches; every other call goes to the implementation it has now.

    Raises:
        Unsupported: its attention cannot be replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    if before.startswith(PREFIX):
        return
    if before == "eager":
        original: Attention = _eager_attention
    elif before in ALL_ATTENTION_FUNCTIONS:
        original = ALL_ATTENTION_FUNCTIONS[before]
    else:
        raise Unsupported(f"its attention implementation {before!r} is not one that can be put behind another")
    name = PREFIX + before
    ignored = IGNORED_BY.get(before, set())
    attend = torch.compiler.disable(packed_attention)  # its layout is another object in every batch

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        layout = getattr(attention_mask, ATTRIBUTE, None)
        cached = getattr(key, ATTRIBUTE, None)
        if layout is None and cached is None:
            return original(module, query, key, value, attention_mask, *args, **keywords)
        if args:
            raise Unsupported("its attention passes arguments by position")
        used = {k: v for k, v in keywords.items() if k not in ignored}
        result: tuple[Tensor, Tensor | None]
        if cached is not None:
            result = cached.attend(module, query, **used)
        else:
            result = attend(layout, module, query, key, value, **used)
        return result

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        if before in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise Unsupported("its attention implementation cannot be set")


def _eager_attention(module: Any, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the file that defines the model."""
    defined_in = sys.modules[type(module).__module__]
    result: tuple[Tensor, Tensor | None] = defined_in.eager_attention_forward(module, *args, **keywords)
    return result


def uninstall(model: Any) -> None:
    """Gives a model back the attention implementation it had."""
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))
