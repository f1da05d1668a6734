"""Attention over the packed layout, as an attention implementation of transformers.

The packed batch is one sequence ``[prompt a][prompt b]..[text of row 0][text of row 1]..``. Each prompt attends to
itself; each row's text attends to its prompt and to itself. The batch's :class:`PackedLayout` is an attribute of a 4-D
attention mask. transformers passes such a mask unchanged from the model's arguments to its attention, also when
gradient checkpointing runs a layer a second time. With any other mask the model's own implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.attention import check_keywords
from ..ops.packing.functional import pack, unpack
from ..ops.segment_attention import functional as segment_attention
from ..ops.segment_attention import varlen

if TYPE_CHECKING:
    from .layout import PackedLayout, RowGroup


@dataclass(frozen=True)
class ObservedAttention:
    """The arguments of a layer's attention over a packed batch; positions are in queries and keys already."""

    layer: int | None
    query: Tensor
    """[K, H, E]"""
    key: Tensor
    """[K, H', E]"""
    value: Tensor
    """[K, H', E']"""
    scale: float
    window: int
    """Of a sliding window; 0: none."""
    plain: bool
    """Whether the weights are a softmax of scaled products: no soft cap, no sink beside the keys."""


Observer = Callable[[ObservedAttention], None]


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
    packed = packed_states(query, key, value)
    count_call(layout, packed, sliding_window)
    prefix = layout.compiled_states(module, packed[1], packed[2])
    plain = softcap is None and s_aux is None
    observe(layout, getattr(module, "layer_idx", None), packed, scaling, sliding_window, plain)
    out = attend_packed(
        layout, packed, prefix, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return out[None], None


def packed_states(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values of a batch of one sequence, [K, heads, size] each, as autocast casts SDPA's arguments.

    Raises:
        Unsupported: there are more sequences.
    """
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise Unsupported(f"its attention got {list(query.shape)} queries for {list(key.shape)} keys")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    return [x[0].transpose(0, 1) for x in (query, key, value)]


def count_call(layout: PackedLayout, packed: list[Tensor], window: int | None) -> None:
    """Counts an attention call, for the runner's check that every layer makes one.

    Raises:
        Unsupported: the tensors are not of this batch.
    """
    if len(packed[0]) != layout.slots:
        raise Unsupported(f"its attention got {len(packed[0])} queries for {layout.slots} packed slots")
    layout.calls += 1
    if window:
        layout.windows.add(window)


def observe(
    layout: PackedLayout,
    layer: int | None,
    packed: list[Tensor],
    scaling: float | None,
    window: int | None,
    plain: bool,
) -> None:
    """Gives the arguments of a layer's attention to what reads them besides the attention itself."""
    query, key, value = packed
    if layout.capture is not None:
        layout.store_captured(layer, key, value)
    if layout.observer is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        layout.observer(ObservedAttention(layer, query, key, value, scale, window or 0, plain))


def attend_packed(
    layout: PackedLayout,
    packed: list[Tensor],
    prefix: tuple[Tensor, Tensor] | None,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[K, H, E'], attention of :func:`packed_states`.

    Args:
        prefix: keys [R, H', E] and values of compiled prompts; None: the rows' prefixes are among the packed slots.
    """
    with torch.autocast(packed[0].device.type, enabled=False):
        if not dropout and softcap is None and sinks is None:
            out = _segments(layout, packed, prefix, scaling, window)
            if out is not None:
                return out
        compiled_slots = 0
        if prefix is not None:  # one sequence of compiled and own slots
            compiled_slots = prefix[0].shape[0]
            packed = [packed[0], *(torch.cat([a, b]) for a, b in zip(prefix, packed[1:], strict=True))]
        parts = [
            _attend(
                group,
                packed,
                compiled_slots,
                scaling=scaling,
                dropout=dropout,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            for group in layout.groups
            if group.slots
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _segments(
    layout: PackedLayout,
    packed: list[Tensor],
    prefix: tuple[Tensor, Tensor] | None,
    scaling: float | None,
    window: int | None,
) -> Tensor | None:
    """[K, H, E'] in one call over all segments; None: nothing can do that for these tensors."""
    query, key, value = packed
    prefix_key, prefix_value = prefix or (None, None)
    if segment_attention.available(query):
        return segment_attention.segment_attention(
            query,
            key,
            value,
            layout.table,
            scale=scaling,
            window=window,
            prefix_key=prefix_key,
            prefix_value=prefix_value,
        )
    if not varlen.libraries(query, key, value) or layout.ragged is None:
        return None
    return varlen.varlen_attention(
        query,
        key,
        value,
        layout.ragged,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(window or 0),
        prefix_key=prefix_key,
        prefix_value=prefix_value,
    )


def _attend(
    group: RowGroup,
    packed: list[Tensor],
    compiled_slots: int,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[slots, H, E'], the results of a group's own parts; keys and values begin with `compiled_slots` other slots."""
    query, key, value = packed
    dtype = compute_dtype(query)
    # A single row without prefix is contiguous already.
    single = len(group.prefixes) == 1 and not group.prefixes[0] and not compiled_slots
    if single:
        q, k, v = (x[None, group.first_slot : group.first_slot + group.slots].to(dtype) for x in packed)
    else:
        (q,) = unpack((query,), group.query_rows, dtype)
        k, v = unpack((key, value), group.key_rows(compiled_slots), dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    plain = not any(group.prefixes) and (not window or window >= group.keys)
    mask = None if plain and softcap is None and sinks is None else group.mask(window, dtype)
    if softcap is None and sinks is None:
        out = masked_attention(q, k, v, mask, scaling, dropout)
    else:
        assert mask is not None
        out = explicit_attention(q, k, v, mask, scaling, dropout, softcap, sinks)
    out = out.transpose(1, 2)
    if single:
        return out[0].to(query.dtype)
    return pack((out,), group.result_rows, group.slots, query.dtype)[0]


def compute_dtype(query: Tensor) -> torch.dtype:
    """float32 on a CPU: SDPA's backward takes 2.8 times as long there in bfloat16."""
    return torch.float32 if query.device.type == "cpu" and query.dtype.itemsize == 2 else query.dtype


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """SDPA of [B, H, q, E] queries with [B, H', k, E] keys. Without a mask it is causal.

    With ``enable_gqa`` and a mask PyTorch would take its slow path on a GPU. So a single query per head becomes a row
    of its key head's queries; for several queries keys are repeated there.
    """
    rows, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    folded = groups > 1 and queries == 1 and mask is not None
    if folded:
        query = query.reshape(rows, key.shape[1], groups, -1)
    elif groups > 1 and mask is not None and query.device.type != "cpu":
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.reshape(rows, heads, queries, -1) if folded else out


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capped scores (Gemma 2) or a sink per head (gpt-oss); SDPA has neither."""
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
