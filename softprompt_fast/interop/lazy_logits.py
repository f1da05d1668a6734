"""A model's output whose logits are computed when they are first read: a training loop usually reads only the loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

from torch import Tensor

LOGITS = "logits"


def with_lazy_logits(output: Any, compute: Callable[[], Tensor]) -> Any:
    """`output`, which has a loss and no logits, with logits that `compute` gives when they are first read."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    plain_class: Any = type(output)
    lazy = _lazy_class(plain_class)(**values)
    lazy.defer(compute)
    return lazy


class LazyLogits(OrderedDict[str, Any]):
    """Part of an output class: every way to read the logits computes them first."""

    plain_class: type
    """The output class of transformers."""

    def defer(self, compute: Callable[[], Tensor]) -> None:
        """Gives the logits their place after the loss."""
        later = [name for name in self if name != "loss"]
        self.__dict__["_compute"] = compute
        OrderedDict.__setitem__(self, LOGITS, None)
        for name in later:
            self.move_to_end(name)

    def _fill(self) -> None:
        compute = self.__dict__.pop("_compute", None)
        if compute is not None:
            self.__dict__[LOGITS] = compute()
            OrderedDict.__setitem__(self, LOGITS, self.__dict__[LOGITS])

    @property
    def logits(self) -> Tensor | None:
        self._fill()
        return self.__dict__.get(LOGITS)

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__.pop("_compute", None)
        self.__dict__[LOGITS] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return tuple(self[name] for name in list(self)[key])
        if not isinstance(key, str):
            return self[list(self)[key]]
        if key == LOGITS:
            self._fill()
        return OrderedDict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        if key == LOGITS:
            self._fill()
        return super().get(key, default)

    def items(self) -> Any:
        self._fill()
        return super().items()

    def values(self) -> Any:
        self._fill()
        return super().values()

    def __reduce__(self) -> tuple[Any, ...]:
        return self.plain_class, tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@cache
def _lazy_class(plain_class: Any) -> Any:
    return type(plain_class.__name__, (LazyLogits, plain_class), {"plain_class": plain_class})
