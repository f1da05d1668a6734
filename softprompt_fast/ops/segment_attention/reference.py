"""Segment attention in plain PyTorch: the oracle of the tests, and the fallback for other devices and float64."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    queries: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """The output of the native op for the same arguments; its gradient is PyTorch's own. Waits for a GPU.

    Args:
        queries: [segments, 2] int64, first slot in ``query`` and number of each segment's queries, which are the last
            of its own part; None: its own slots.
        window: 0 for none.
    """
    lines = table.tolist()
    asking = [line[:2] for line in lines] if queries is None else queries.tolist()
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (query, key, value))
    before_k = k if prefix_key is None else prefix_key.to(wide)
    before_v = v if prefix_value is None else prefix_value.to(wide)
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2], dtype=wide)
    for line, (own, length, prefix, prefix_length) in enumerate(lines):
        first, count = asking[line]
        _check(line, own, length, len(k))
        _check(line, prefix, prefix_length, len(before_k))
        if first < 0 or count < 0 or first + count > len(q) or count > length:
            raise RuntimeError(f"queries {line} leave the query tensor, or are more than the segment's own keys")
        if not count:
            continue
        keys = torch.cat([before_k[prefix : prefix + prefix_length], k[own : own + length]])
        values = torch.cat([before_v[prefix : prefix + prefix_length], v[own : own + length]])
        slots = torch.arange(first, first + count, device=query.device)
        out = out.index_copy(0, slots, _attend(q[first : first + count], keys, values, scale, window))
    return out.to(query.dtype)


def _check(line: int, first: int, length: int, slots: int) -> None:
    if first < 0 or length < 0 or first + length > slots:
        raise RuntimeError(f"line {line} of the table leaves the tensors")


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """[t, H, E'] for queries [t, H, E], which are the last of the keys [k, H', E]; values [k, H', E']."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    place = torch.arange(len(key), device=key.device)
    last = place[-len(query) :, None]  # the last key that each query sees
    hidden = place > last
    if window:
        hidden = hidden | (place <= last - window)
    scores = torch.einsum("the,khe->htk", query * scale, key).masked_fill(hidden, float("-inf"))
    return torch.einsum("htk,khe->the", scores.softmax(-1), value)
