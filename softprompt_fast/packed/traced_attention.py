"""Attention over the packed layout inside of a model that torch.compile compiles: one op that it does not look into.

The layout is another object in every batch, so a compiled graph cannot hold it. The graph gets a tensor with the
layout's number instead. The op finds the layout by this number when it runs, counts its call there, and computes what
the uncompiled model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.attention import check_keywords
from ..ops.extension import backend
from ..ops.segment_attention import functional as segment_attention
from .attention import attend_packed, count_call, observe, packed_states

if TYPE_CHECKING:
    from .layout import PackedLayout

_numbers = count()
_layouts: WeakValueDictionary[int, PackedLayout] = WeakValueDictionary()
"""The layouts that still have a handle, by their number."""


def layout_handle(layout: PackedLayout) -> Tensor:
    """A tensor [1] on the CPU with a new number of a layout, which it keeps alive.

    A compiled backward pass saves the tensor, and so the layout lives until that pass has run.
    """
    number = next(_numbers)
    handle = torch.tensor([number])
    handle._softprompt_fast_owner = layout  # type: ignore[attr-defined]
    _layouts[number] = layout
    return handle


def traced_attention(
    layout: PackedLayout,
    handle: Tensor,
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
    """As :func:`packed_attention`, without dropout. Reads nothing of the layout that differs between batches."""
    check_keywords(module, is_causal, keywords)
    packed = packed_states(query, key, value)
    prefix_key, prefix_value = layout.compiled_states(module, packed[1], packed[2]) or (None, None)
    out, _ = _attention(
        *packed,
        handle,
        getattr(module, "layer_idx", None),
        prefix_key,
        prefix_value,
        s_aux,
        scaling,
        sliding_window or 0,
        softcap,
    )
    return out[None], None


def _layout_of(handle: Tensor) -> PackedLayout:
    layout = _layouts.get(int(handle))
    if layout is None:
        raise Unsupported("its compiled attention ran without a packed batch, or after the batch was gone")
    return layout


def _is_native(query: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
    return softcap is None and sinks is None and segment_attention.available(query)


# No CUDA graph may replay the op: it reads the layout of each batch on the host.
@torch.library.custom_op(
    "softprompt_fast_packed::attention",
    mutates_args=(),
    tags=[torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides],
)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    layer: int | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    window: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """[K, H, E'], and what the native kernel's backward needs beside it: [K, H] or [0]."""
    layout = _layout_of(handle)
    count_call(layout, [query], window)
    observe(layout, layer, [query, key, value], scaling, window, softcap is None and sinks is None)
    if _is_native(query, softcap, sinks):
        ops = backend.ops_for(query.device)
        assert ops is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out, log_sums = ops.attention(query, key, value, layout.table, None, prefix_key, prefix_value, scale, window)
        return out, log_sums
    with _autograd_inside_an_op(), torch.no_grad():
        out = _attend(layout, [query, key, value], prefix_key, prefix_value, sinks, scaling, window, softcap)
    return _unshared(out), query.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    layer: int | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    window: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    sums = query.shape[:2] if _is_native(query, softcap, sinks) else (0,)
    return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(sums, dtype=torch.float32)


def _unshared(result: Tensor) -> Tensor:
    """A contiguous tensor that shares no memory, as results of an op must be; parts of one gradient do."""
    alone = result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes
    return result if alone else result.clone(memory_format=torch.contiguous_format)


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """PyTorch switches autograd off inside of an op; here it works, for instance for the first try of a library."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys):
        yield


def _attend(
    layout: PackedLayout,
    packed: list[Tensor],
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    window: int,
    softcap: float | None,
) -> Tensor:
    prefix = None if prefix_key is None or prefix_value is None else (prefix_key, prefix_value)
    return attend_packed(
        layout, packed, prefix, scaling=scaling, dropout=0.0, window=window or None, softcap=softcap, sinks=sinks
    )


@torch.library.custom_op(
    "softprompt_fast_packed::attention_backward",
    mutates_args=(),
    tags=[torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides],
)
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    sinks: Tensor | None,
    out: Tensor | None,
    log_sums: Tensor,
    scaling: float | None,
    window: int,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of query, key, value and of those among prefix keys, prefix values and sinks that are there."""
    layout = _layout_of(handle)
    if out is not None:
        ops = backend.ops_for(grad.device)
        assert ops is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        found: list[Tensor] = ops.attention_backward(
            grad, query, key, value, layout.table, prefix_key, prefix_value, out, log_sums, scale, window
        )
        return found
    # What a library's attention would save cannot be said ahead, so the forward pass runs again.
    with _autograd_inside_an_op(), torch.enable_grad():
        inputs = (query, key, value, prefix_key, prefix_value, sinks)
        given = [None if x is None else x.detach().requires_grad_() for x in inputs]
        leaves = [x for x in given if x is not None]
        again = _attend(layout, leaves[:3], *given[3:], scaling, window, softcap)  # type: ignore[call-arg,arg-type]
        return [_unshared(x) for x in torch.autograd.grad(again, leaves, grad)]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    inputs = (query, key, value, prefix_key, prefix_value, sinks)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs if x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, handle, _layer, prefix_key, prefix_value, sinks, *ctx.options = inputs
    out, log_sums = output
    kept = out if _is_native(query, ctx.options[2], sinks) else None
    ctx.save_for_backward(query, key, value, handle, prefix_key, prefix_value, sinks, kept, log_sums)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors[4:7]
    query, key, value, *rest = _attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    others = [None if x is None else rest.pop(0) for x in given]
    return (query, key, value, None, None, *others, None, None, None)


_attention.register_autograd(_gradients, setup_context=_setup)
