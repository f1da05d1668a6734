"""Lists and tensors of integers, on the host or on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..extension.contract import FEW_INTEGERS
from .checks import check_integers, fail, readable


def known_integers(values: Tensor | Sequence[int], argument: str, needed: bool) -> list[int] | None:
    """Integers as a list if they are on the host or needed there; None if they stay on the GPU or in the graph."""
    if isinstance(values, Tensor) and (torch.compiler.is_compiling() or not (needed or values.device.type == "cpu")):
        check_integers(argument, values)
        return None
    return host_integers(values, argument)


def host_integers(values: Tensor | Sequence[int], argument: str) -> list[int]:
    """Integers as a list; waits for the GPU if they are on it."""
    check_integers(argument, values)
    if not isinstance(values, Tensor):
        return list(values)
    if not readable(values):
        raise fail(argument, "hold values that can be read", values)
    return values.tolist()


def kernel_integers(values: Tensor | Sequence[int], device: torch.device, may_stay: bool) -> Tensor:
    """Integers as a contiguous int64 tensor that a kernel on the device can read; nothing waits for the device.

    Args:
        may_stay: few integers that are on the host stay there: a kernel's arguments take them along, without a copy.
    """
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.int64)
    target = device
    if may_stay and values.device.type == "cpu" and values.shape[0] <= FEW_INTEGERS:
        target = values.device
    if values.dtype is torch.int64 and values.device == target and values.is_contiguous():
        return values
    return values.to(device=target, dtype=torch.int64, non_blocking=True).contiguous()
