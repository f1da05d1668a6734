"""Causal attention of many segments in one pass over packed queries, keys and values.

Each segment attends to a prefix and to itself; prefixes are shared. The native kernel, for CPUs only, reads them in
place: nothing is gathered or padded. On a GPU a library's variable-length attention reads a copy of keys and values in
which each segment's prefix precedes its own (``varlen.py``). Elsewhere the reference runs, which is slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend
from . import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        scale: float,
        window: int,
    ) -> Tensor:
        ops = backend.ops_for(query.device)
        assert ops is not None
        out: Tensor
        out, log_sums = ops.attention(query, key, value, table, None, prefix_key, prefix_value, scale, window)
        ctx.save_for_backward(query, key, value, table, prefix_key, prefix_value, out, log_sums)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ops = backend.ops_for(grad.device)
        assert ops is not None
        query_grad, key_grad, value_grad, *prefix = ops.attention_backward(
            grad, *ctx.saved_tensors, ctx.scale, ctx.window
        )
        return (query_grad, key_grad, value_grad, None, *(prefix or (None, None)), None, None)


def available(query: Tensor) -> bool:
    """Whether the native kernel runs for such a tensor."""
    return query.device.type == "cpu" and query.dtype in DTYPES and backend.ops_for(query.device) is not None


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """Attention of each segment's queries to its prefix and, causally, to itself.

    Args:
        query: [K, H, E] in float32, bfloat16 or float16 (sums are float32), or float64.
        key: [K, H', E]; H is a multiple of H'.
        value: [K, H', E']
        table: [segments, 4] int64: first slot and length of a segment's own part, first slot and length of its prefix.
            Own parts do not overlap; prefixes may.
        scale: of the scores; None: 1 / sqrt(E).
        window: each query sees this many keys at most, itself included; None: all before it.
        prefix_key, prefix_value: [R, H', E] and [R, H', E'], the slots of prefixes; None: ``key`` and ``value``.

    Returns:
        [K, H, E'], zero at slots that no segment holds. Gradients of shared prefixes are summed in float32, in the
        order of segments by the native kernel: the same bits every time.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not available(query):
        return reference.segment_attention(
            query, key, value, table, None, prefix_key, prefix_value, scale, int(window or 0)
        )
    result: Tensor = _SegmentAttention.apply(
        query, key, value, table, prefix_key, prefix_value, scale, int(window or 0)
    )
    return result


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    queries: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """:func:`segment_attention` of the last queries of each segment only, whose keys are cached. Without a gradient.

    Args:
        query: [Q, H, E]
        queries: [segments, 2] int64: first slot in ``query`` and number of a segment's queries. The last of them
            belongs to the segment's last own key.

    Returns:
        [Q, H, E'], zero at queries of no segment.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, table, queries, prefix_key, prefix_value, scale, int(window or 0))
    ops = backend.ops_for(query.device) if available(query) else None
    with torch.no_grad():
        out: Tensor = reference.segment_attention(*arguments) if ops is None else ops.attention(*arguments)[0]
    return out
