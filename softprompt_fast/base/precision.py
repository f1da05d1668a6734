"""How PyTorch multiplies float32 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
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
    """Within it, products of float32 matrices have this precision; None: that which the user has set.

    The setting is that of the whole process. If threads use this at once, the one that entered last decides.
    """
    if precision is None:
        yield
        return
    entry = (object(), precision)
    with _lock:
        if not _entered:
            _users.append(_Setting())
        _entered.append(entry)
        _set(precision)
    try:
        yield
    finally:
        with _lock:
            _entered.remove(entry)
            if _entered:
                _set(_entered[-1][1])
            else:
                _users.pop().restore()


_lock = Lock()
_entered: list[tuple[object, str]] = []
"""The uses of :func:`float32_products` that are going on, and their precisions."""
_users: list[_Setting] = []
"""What the user has set, while there are any."""


class _Setting:
    """What is set now: a common precision, and those of backends, which can be their own or their parent's."""

    def __init__(self) -> None:
        import torch

        self.own = {name: backend.fp32_precision for name, backend in _backends().items()}
        for backend in _backends().values():
            backend.fp32_precision = "ieee"  # the common precision can be read while backends agree with each other
        self.common = torch.get_float32_matmul_precision()

    def restore(self) -> None:
        _set(self.common)
        for name, backend in _backends().items():
            backend.fp32_precision = "none"  # that of its parent
            if backend.fp32_precision != self.own[name]:
                backend.fp32_precision = self.own[name]


def _set(precision: str) -> None:
    import torch

    torch.set_float32_matmul_precision(precision)


def _backends() -> dict[str, Any]:
    """The settings of each type of device."""
    import torch

    backends: Any = torch.backends  # not all of it is annotated
    return {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
