"""Freezes parameters, and trains others, for as long as someone needs it."""

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


class Trained:
    """A parameter that nobody freezes while this object lives."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def give_gradient(self) -> None:
        """Gives the parameter a gradient while this object lives."""
        trained = self.parameter.requires_grad or id(self.parameter) in _frozen
        self.parameter.requires_grad_(True)
        if not trained:
            weakref.finalize(self, self.parameter.requires_grad_, False).atexit = False


_lock = threading.RLock()
_frozen: weakref.WeakValueDictionary[int, Frozen] = weakref.WeakValueDictionary()
"""By the identity of the parameter, which the value keeps alive."""
_trained: weakref.WeakValueDictionary[int, Trained] = weakref.WeakValueDictionary()


def keep_trainable(parameters: Iterable[nn.Parameter]) -> list[Trained]:
    """Keeps :func:`freeze` from freezing parameters, until the last of those who asked for it drops its list."""
    with _lock:
        kept = []
        for parameter in parameters:
            trained = _trained.get(id(parameter)) or Trained(parameter)
            _trained[id(parameter)] = trained
            kept.append(trained)
    return kept


def freeze(parameters: Iterable[nn.Parameter]) -> list[Frozen]:
    """Freezes parameters until the last of those who asked for it drops its list.

    A parameter that the caller had frozen before is left to the caller. One that someone trains is not frozen.
    """
    kept = []
    with _lock:
        for parameter in parameters:
            if id(parameter) in _trained:
                continue
            frozen = _frozen.get(id(parameter))
            if frozen is None and parameter.requires_grad:
                frozen = _frozen[id(parameter)] = Frozen(parameter)
            parameter.requires_grad_(False)
            if frozen is not None:
                kept.append(frozen)
    return kept


def train(parameters: Iterable[nn.Parameter]) -> list[Trained]:
    """Gives parameters a gradient until the last of those who asked for it drops its list."""
    with _lock:
        kept = keep_trainable(parameters)
        for trained in kept:
            trained.give_gradient()
    return kept
