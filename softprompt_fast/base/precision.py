"""How PyTorch multiplies float32 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PRECISIONS = ("highest", "high", "medium")
"""Of ``torch.set_float32_matmul_precision``."""


def float32_precision(device: Any) -> str:
    """ "tf32" or "bf16" if products of float32 matrices on a device may be rounded so, else "ieee".

    Users choose this with ``torch.set_float32_matmul_precision``, or for a backend alone, such as
    ``torch.backends.mkldnn.matmul.fp32_precision``. The former cannot be read after the latter was changed.
    """
    chosen = getattr(_backends().get(device.type), "fp32_precision", "none")
    return chosen if chosen in ("tf32", "bf16") else "ieee"


@contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Within it, products of float32 matrices have this precision; None: that which the user has set."""
    import torch

    if precision is None:
        yield
        return
    backends = _backends().values()
    own = [backend.fp32_precision for backend in backends]
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends have settings of their own
        common = "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(common)
        for backend, chosen in zip(backends, own, strict=True):
            backend.fp32_precision = chosen


def _backends() -> dict[str, Any]:
    """The settings of each type of device."""
    import torch

    backends: Any = torch.backends  # not all of it is annotated
    return {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
