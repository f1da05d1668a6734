"""Products with float32 weights on CPUs for which PyTorch's usual library has no code of its own.

PyTorch multiplies float32 matrices with MKL, which is slower than oneDNN on x86 CPUs of other makers than Intel. On an
AMD EPYC oneDNN takes 8 % less time for a training step of SmolLM2-135M. PyTorch contains both, but has no setting that
chooses oneDNN for float32, so calls of ``F.linear`` are handed to its op while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..base.machine import cpu_vendor
from .embedding import own_embedding

SLOTS = 4
"""Fewer slots gain less than looking at every call costs. With 4 to 60 slots, oneDNN takes 7 to 26 % less time on an
AMD EPYC."""
VENDORS = ("AuthenticAMD", "HygonGenuine")
PLAIN = (Tensor, torch.nn.Parameter)


def faster_products(model: Any, slots: int) -> AbstractContextManager[Any]:
    """Within it, the linear layers of a model on a CPU use oneDNN where this is faster.

    The values differ from the usual ones by rounding. The choice depends on the machine and on `slots` alone, so that a
    run gives the same numbers again.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    weight = own_embedding(model.get_input_embeddings()).weight
    if slots < SLOTS or weight.device.type != "cpu" or weight.dtype != torch.float32 or not is_faster():
        return nullcontext()
    if _get_current_dispatch_mode() is not None or _may_be_compiled(model):
        return nullcontext()
    return _FasterLinear()


@cache
def is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than PyTorch's usual library on this machine."""
    if cpu_vendor() not in VENDORS or not torch.backends.mkl.is_available():
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = (torch.arange(n, dtype=torch.float32) for n in (6, 12, 4))
    x, weight = x.view(2, 3), weight.view(4, 3)
    try:  # it is not part of PyTorch's public interface
        return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except (RuntimeError, TypeError):
        return False


def _may_be_compiled(model: Any) -> bool:
    """Whether a graph of torch.compile may run: it would be compiled once within the mode and once without."""
    modules = (vars(module) for module in model.modules())
    return any("forward" in own or own.get("_compiled_call_impl") is not None for own in modules)


class _FasterLinear(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and not kwargs and _fits(*args):
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args):
                return _Linear.apply(*args, *[None] * (3 - len(args)))
            return _product(*args)
        return function(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether this is a product of ordinary, contiguous float32 matrices."""
    if type(x) is not Tensor or type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return False
    if weight.dim() != 2 or (bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1])):
        return False
    if not all(one is None or one.is_contiguous() for one in (x, weight, bias)):
        return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.aten._unsafe_view(product, product.shape)  # a view could not be changed in place


class _Linear(torch.autograd.Function):
    """``F.linear`` with a weight [N, K] and a bias [N], differentiable once.

    Trained weights are multiplied here too, so that a layer gives the same values whether it is trained or frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]) if weight.requires_grad else None
        transposed = weight.t() if x.requires_grad else None
        # In the order of F.linear: checkpointing counts and compares saved tensors.
        ctx.save_for_backward(*((transposed, rows) if bias is None else (rows, transposed)))
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, transposed = ctx.saved_tensors if ctx.has_bias else reversed(ctx.saved_tensors)
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, transposed) if ctx.needs_input_grad[0] else None,
            flat.t() @ rows if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )
