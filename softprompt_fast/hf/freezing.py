"""Freezes parameters, and trains others, for as long as someone needs it.

Several objects can use one model. Each claims what it needs of a parameter. What counts is, in this order: it is
trained; it is kept as it is; it is frozen; nobody claims it, and it is as it was before.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable

from torch import nn

FROZEN, KEPT, TRAINED = "frozen", "kept", "trained"
_lock = threading.RLock()


class _State:
    """What is claimed of one parameter. The claims hold it, and it keeps the parameter alive."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.own = parameter.requires_grad
        """Whether it has a gradient when nobody claims it."""
        self.claims: Counter[str] = Counter()

    def change(self, kind: str, by: int) -> None:
        with _lock:
            self.claims[kind] += by
            if self.claims[TRAINED]:
                self.parameter.requires_grad_(True)
            elif self.claims[FROZEN] and not self.claims[KEPT]:
                self.parameter.requires_grad_(False)
            elif not self.claims[KEPT]:
                self.parameter.requires_grad_(self.own)


_states: weakref.WeakValueDictionary[int, _State] = weakref.WeakValueDictionary()
"""By the identity of the parameter."""


class Claim:
    """Claims a parameter while this object lives."""

    def __init__(self, state: _State, kind: str) -> None:
        self.parameter = state.parameter
        self.own = state.own
        """Whether the parameter has a gradient when nobody claims it."""
        state.change(kind, 1)
        weakref.finalize(self, state.change, kind, -1).atexit = False


def freeze(parameters: Iterable[nn.Parameter]) -> list[Claim]:
    """Freezes parameters until the last of those who asked for it drops its list.

    A parameter that the caller had frozen before is left to the caller. One that someone trains is frozen afterwards.
    """
    with _lock:
        claimed = [each for each in parameters if each.requires_grad or id(each) in _states]
        return _claims(claimed, FROZEN)


def keep_trainable(parameters: Iterable[nn.Parameter]) -> list[Claim]:
    """Keeps :func:`freeze` from freezing parameters, until the last of those who asked for it drops its list."""
    return _claims(parameters, KEPT)


def train(parameters: Iterable[nn.Parameter]) -> list[Claim]:
    """Gives parameters a gradient until the last of those who asked for it drops its list."""
    return _claims(parameters, TRAINED)


def _claims(parameters: Iterable[nn.Parameter], kind: str) -> list[Claim]:
    with _lock:
        claims = []
        for parameter in parameters:
            state = _states.get(id(parameter))
            if state is None:
                state = _states[id(parameter)] = _State(parameter)
            claims.append(Claim(state, kind))
        return claims
