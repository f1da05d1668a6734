"""Segment attention on a GPU by a library's variable-length flash attention.

PyTorch's own (``torch.nn.attention.varlen``), or that of the package ``flash_attn``. A library is tried on short
segments first. Where both work, they are timed once for each kind of call.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ragged import Line, RaggedPlan, ragged_keys

logger = logging.getLogger(__name__)
VarlenAttention = Callable[[Tensor, Tensor, Tensor, RaggedPlan, float, int], Tensor]
"""Queries [K, H, E], keys [C, H', E], values [C, H', E], a plan, the scale, the window (0: none) -> [K, H, E].

The last query of a segment sees its last key (causal, aligned at the bottom right).
"""
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
TIMED_CALLS = 3
TOLERANCE = 0.05
"""bfloat16 has steps of 1/128; the values compared are of the size of 1."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RaggedPlan,
    *,
    scale: float,
    window: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> Tensor:
    """As :func:`segment_attention`, by one of :func:`libraries`, of which there must be one."""
    if not query.shape[0]:
        return query.new_empty(*query.shape[:2], value.shape[2])
    keys, values = ragged_keys(plan, key, prefix_key), ragged_keys(plan, value, prefix_value)
    arguments = (query, keys, values, plan, scale, window)
    return LIBRARIES[_fastest(libraries(query, key, value), arguments)](*arguments)


def libraries(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """The libraries that attend to such tensors rightly."""
    size = query.shape[-1]
    fits = query.dtype in DTYPES and size == value.shape[-1] and size % 8 == 0 and size <= LARGEST_HEAD
    if not fits or query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        return []
    kind = (query.device, query.dtype, query.shape[1], key.shape[1], size)
    return [name for name in LIBRARIES if find(name) is not None and works(name, *kind)]


@cache
def works(name: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether a library gives the results and gradients of the reference for three short segments. Waits once."""
    lines: list[Line] = [(0, 5, 0, 0), (5, 3, 0, 5), (8, 0, 0, 5)]
    shapes = ((8, heads, size), (8, key_heads, size), (8, key_heads, size))
    try:
        # The first call may be in a pass without gradients, and its answer stays.
        with torch.inference_mode(False), torch.enable_grad():
            plan = RaggedPlan.of(lines, device)
            assert plan is not None
            random = torch.Generator().manual_seed(0)
            given = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
            for window in (0, 4):
                _compare_with_reference(LIBRARIES[name], given, plan, torch.tensor(lines), window)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        logger.warning("%s is not used for packed batches: %s", name, " ".join(str(error).split())[:300])
        return False
    return True


def _compare_with_reference(
    attention: VarlenAttention, given: list[Tensor], plan: RaggedPlan, table: Tensor, window: int
) -> None:
    ours, expected = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    scale = given[0].shape[-1] ** -0.5
    keys, values = (ragged_keys(plan, x, None) for x in ours[1:])
    out = attention(ours[0], keys, values, plan, scale, window)
    query, key, value = expected
    wanted = reference.segment_attention(query, key, value, table, None, None, None, scale, window)
    found, right = (torch.autograd.grad(x.float().pow(2).sum(), xs) for x, xs in ((out, ours), (wanted, expected)))
    for a, b in [(out, wanted), *zip(found, right, strict=True)]:
        torch.testing.assert_close(a.float(), b.float(), rtol=TOLERANCE, atol=TOLERANCE)


@cache
def find(name: str) -> Callable[..., Any] | None:
    module, attribute = {
        "torch": ("torch.nn.attention.varlen", "varlen_attn"),
        "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    }[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return None
    wanted = {"torch": "window_size", "flash_attn": "causal"}[name]  # torch 2.10 has no windows
    return found if wanted in inspect.signature(found).parameters else None


@cache
def takes_groups(function: Callable[..., Any]) -> bool:
    """Whether PyTorch's function shares keys among heads; its first versions do not."""
    return "enable_gqa" in inspect.signature(function).parameters


def _torch(query: Tensor, key: Tensor, value: Tensor, plan: RaggedPlan, scale: float, window: int) -> Tensor:
    function = find("torch")
    assert function is not None
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if takes_groups(function):
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out: Tensor = function(
        query,
        key,
        value,
        *plan.bounds,
        scale=scale,
        window_size=(window - 1, 0) if window else (-1, 0),
        **options,
    )
    return out


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, plan: RaggedPlan, scale: float, window: int) -> Tensor:
    function = find("flash_attn")
    assert function is not None
    out: Tensor = function(
        query,
        key,
        value,
        *plan.bounds,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1 if window else -1, -1),
    )
    return out


LIBRARIES: dict[str, VarlenAttention] = {"torch": _torch, "flash_attn": _flash_attn}
_choices: dict[Any, str] = {}


def _fastest(names: Sequence[str], arguments: tuple[Any, ...]) -> str:
    """Of several libraries the one that took the least time; each kind of call is timed once."""
    if len(names) == 1:
        return names[0]
    query, key, _, _, _, window = arguments
    kind = (query.device, query.dtype, query.shape[1:], key.shape[1], window, tuple(names))
    if kind not in _choices:
        with torch.no_grad():
            times = {name: _milliseconds(LIBRARIES[name], arguments) for name in names}
        _choices[kind] = min(times, key=lambda name: times[name])
    return _choices[kind]


def _milliseconds(attention: VarlenAttention, arguments: tuple[Any, ...]) -> float:
    attention(*arguments)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TIMED_CALLS):
        attention(*arguments)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
