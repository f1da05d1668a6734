"""Fake kernels of the native ops: the shapes and dtypes of their results, without data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .contract import FEW_INTEGERS, AssembleCall, MaskFormat, Status

MAY_BE_ON_THE_HOST = ("prompt_offsets", "prompt_ids", "use_ids")


def _on_one_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses what the real kernels refuse: beside a meta tensor another one would get a result without data."""
    names = list(AssembleCall._fields if kernel.__name__ == "assemble" else inspect.signature(kernel).parameters)

    @wraps(kernel)
    def checked(*arguments: Any, **named: Any) -> Any:
        devices = set()
        by_position = [names[min(i, len(names) - 1)] for i in range(len(arguments))]  # the last name is of all the rest
        for name, value in (*zip(by_position, arguments, strict=True), *named.items()):
            few = name in MAY_BE_ON_THE_HOST
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(x, Tensor) and not (few and x.device.type == "cpu" and x.numel() <= FEW_INTEGERS):
                    devices.add(str(x.device))
        if len(devices) > 1:
            raise RuntimeError(f"the tensors must be on one device, got {', '.join(sorted(devices))}")
        return kernel(*arguments, **named)

    return checked


@_on_one_device
def assemble(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    call = AssembleCall(*arguments, **named)
    rows, tokens = call.input_ids.shape
    packed = call.plan is not None
    lead = (1, call.slots) if packed else (rows, call.width)
    mask_dtype = call.attention_mask.dtype if call.attention_mask is not None else torch.int64

    def long(*shape: int) -> Tensor:
        return call.input_ids.new_empty(shape, dtype=torch.int64)

    masks = {
        MaskFormat.NONE: lambda: long(0),
        MaskFormat.TWO_D: lambda: call.input_ids.new_empty(lead, dtype=mask_dtype),
        MaskFormat.FOUR_D_BOOL: lambda: call.input_ids.new_empty((rows, 1, call.width, call.width), dtype=torch.bool),
        MaskFormat.FOUR_D_ADDITIVE: lambda: call.embedding.new_empty((rows, 1, call.width, call.width)),
    }
    return (
        call.embedding.new_empty((*lead, call.embedding.shape[1])),
        masks[MaskFormat(call.mask_format)](),
        long(*lead),
        call.labels.new_empty(lead) if call.labels is not None else long(0),
        long(rows, tokens),
        long(call.prompt_segments if packed else rows),
        long(call.slots if packed else 0),
        long(len(Status) if call.check else 0),
    )


@_on_one_device
def prompt_backward(
    grad: Tensor,
    prompt_slots: Tensor,
    use_ids: Tensor | None,
    prompt_offsets: Tensor,
    prompt_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((prompt_rows, grad.shape[-1]), dtype=dtype)


@_on_one_device
def embedding_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_slots: Tensor,
    vocabulary: int,
    padding_idx: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((vocabulary, grad.shape[-1]), dtype=dtype)


@_on_one_device
def unpack(packed: list[Tensor], table: Tensor, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty((table.shape[0], width, *x.shape[1:]), dtype=dtype) for x in packed]


@_on_one_device
def pack(rows: list[Tensor], places: Tensor, starts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty((starts.shape[0] - 1, *x.shape[2:]), dtype=dtype) for x in rows]


@_on_one_device
def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    slots, heads, _size = query.shape
    out = query.new_empty((slots, heads, value.shape[-1]))
    return out, query.new_empty((slots, heads), dtype=torch.float32)


@_on_one_device
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    inputs = [x for x in (query, key, value, prefix_key, prefix_value) if x is not None]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
