"""Causal attention of many segments in one pass over packed queries, keys and values, read where they lie.

The native form of what ``shared_attention.py`` otherwise does with padded copies and SDPA: each segment attends to a
prefix and to itself, prefixes are shared, nothing is gathered or padded. On a CPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend as _library

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
        ops = _library.ops_for(query.device)
        assert ops is not None
        out: Tensor
        out, log_sums = ops.attention(query, key, value, table, None, prefix_key, prefix_value, scale, window)
        ctx.save_for_backward(query, key, value, table, prefix_key, prefix_value, out, log_sums)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ops = _library.ops_for(grad.device)
        assert ops is not None
        query_grad, key_grad, value_grad, *prefix = ops.attention_backward(
            grad, *ctx.saved_tensors, ctx.scale, ctx.window
        )
        return (query_grad, key_grad, value_grad, None, *(prefix or (None, None)), None, None)


def available(query: Tensor) -> bool:
    """Whether the native kernel runs for tensors like this one."""
    return query.device.type == "cpu" and query.dtype in DTYPES and _library.ops_for(query.device) is not None


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
        query: [K, H, E] in float32, bfloat16 or float16; sums are float32.
        key: [K, H', E]; H is a multiple of H'.
        value: [K, H', E']
        table: [segments, 4] int64: first slot and length of a segment's own part, first slot and length of its prefix.
            Own parts do not overlap; prefixes may.
        scale: of the scores; None: 1 / sqrt(E).
        window: each query sees this many keys at most, itself included; None: all before it.
        prefix_key, prefix_value: [R, H', E] and [R, H', E'], where prefixes lie; None: among ``key`` and ``value``.

    Returns:
        [K, H, E'], zero at slots that no segment holds. Gradients of shared prefixes are summed in float32, in the
        order of segments: the same bits every time.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _SegmentAttention.apply(
        query, key, value, table, prefix_key, prefix_value, float(scale), int(window or 0)
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
    """:func:`segment_attention` of the last queries of each segment alone, without a gradient: its keys are cached.

    Args:
        query: [Q, H, E]
        queries: [segments, 2] int64: first slot in ``query`` and number of a segment's queries; the last of them
            stands at the segment's last own key.

    Returns:
        [Q, H, E'], zero at queries of no segment.
    """
    ops = _library.ops_for(query.device)
    assert ops is not None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = ops.attention(
        query, key, value, table, queries, prefix_key, prefix_value, float(scale), int(window or 0)
    )[0]
    return out
