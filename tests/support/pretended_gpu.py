"""Tensors that say they are on a GPU and compute on the CPU: reading a value of one on the host is an error.

A GPU's kernels run after the call that launches them, so a program that never reads a value never waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from softprompt_fast.ops.extension import backend


class _Backend(_DummyBackendModule):  # type: ignore[misc, no-any-unimported]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
GPU = torch.device("pretended", 0)
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.equal,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
}


NO_LAUNCH = {"detach", "alias", "view", "_unsafe_view", "slice", "select", "as_strided", "unsqueeze", "expand", "t"}
NO_LAUNCH |= {"empty", "empty_like", "new_empty", "empty_strided", "transpose", "permute", "unbind", "split"}
_launched: list[str] = []


def packet_name(func: Any) -> str:
    """As in ``aten.copy_``: without namespace and overload."""
    return str(func.overloadpacket).rsplit(".", 1)[-1]


class Waits(AssertionError):
    """A value of the device was read on the host."""


_allowed: list[bool] = []


def _wait(what: str) -> None:
    if not _allowed:
        raise Waits(f"{what} reads values of the GPU on the host")


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
            requires_grad=held.requires_grad,
        )
        assert isinstance(made, OnGpu)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu{tuple(self.shape)}"

    def tolist(self) -> Any:
        _wait("tolist()")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        _wait("numpy()")
        return self.held.numpy(force=force)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there: list[bool] = []

    def inside(x: Any) -> Any:
        if isinstance(x, OnGpu):
            there.append(True)
            return x.held
        return x

    plain_args, plain_kwargs = tree_map(inside, args), tree_map(inside, kwargs)
    device = plain_kwargs.get("device")
    if device is not None:
        target = torch.device(device).type
        plain_kwargs["device"] = torch.device("cpu")
        if there and target == "cpu":
            _wait(str(func))
            return func(*plain_args, **plain_kwargs)
        if target == GPU.type:
            there.append(True)
    if there and _waits(func, plain_args, kwargs):
        _wait(str(func))
    result = func(*plain_args, **plain_kwargs)
    if not there:
        return result
    if packet_name(func) not in NO_LAUNCH:
        _launched.append(packet_name(func))
    if func._schema.is_mutable and args and isinstance(args[0], OnGpu) and result is plain_args[0]:
        return args[0]
    return tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, result)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    packet = func.overloadpacket
    if packet in (aten.index, aten.index_put, aten.index_put_):  # a mask of places is counted
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return packet in WAITS


class _Factories(TorchDispatchMode):
    """Tensors that are made on the GPU are pretended ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def to_gpu(module: nn.Module) -> None:
    """Pretends that a module's parameters and buffers are on a GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(OnGpu(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnGpu(buffer)


@contextmanager
def pretended_gpu(*, may_wait: bool = False) -> Iterator[list[str]]:
    """The native ops run for pretended tensors. Reading a value on the host raises :class:`Waits`, or may be done.

    Yields:
        The ops that would have given the GPU something to do, as they run. A native op counts once.
    """
    native = backend.native_ops()
    with (
        _Factories(),
        mock.patch.object(backend, "ops_for", lambda device: native),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch(f"{__name__}._allowed", [True] if may_wait else []),
        mock.patch(f"{__name__}._launched", []) as launched,
    ):
        yield launched
