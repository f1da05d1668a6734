"""Freezes parameters for as long as someone needs them frozen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

from torch import nn


class Frozen:
    """A parameter that has no gradient while this object lives; it had one before."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        parameter.requires_grad_(False)
        weakref.finalize(self, parameter.requires_grad_, True).atexit = False


_lock = threading.RLock()
_frozen: weakref.WeakValueDictionary[int, Frozen] = weakref.WeakValueDictionary()
"""By the identity of the parameter, which the value keeps alive."""


def freeze(parameters: Iterable[nn.Parameter]) -> list[Frozen]:
    """Freezes parameters until the last of those who asked for it drops its list.

    A parameter that the caller had frozen before is left to the caller.
    """
    kept = []
    with _lock:
        for parameter in parameters:
            frozen = _frozen.get(id(parameter))
            if frozen is None and parameter.requires_grad:
                frozen = _frozen[id(parameter)] = Frozen(parameter)
            parameter.requires_grad_(False)
            if frozen is not None:
                kept.append(frozen)
    return kept
