"""Which objects use the head of a base model, and whether it is still the head that the base began with.

Several objects may be made over one base, and there is one head for the prompts of all of them.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..hf.architecture import without_adapters
from ..hf.heads import head_parameters, loadable_modules


class _Head:
    """What is known of the head of one base."""

    def __init__(self, base: nn.Module) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.first = _versions(base)
        self.changed = False
        """Whether it was known to be changed before the first user; a copy of a model knows it from the original."""


_lock = threading.RLock()
_heads: weakref.WeakKeyDictionary[nn.Module, _Head] = weakref.WeakKeyDictionary()


def use_head(model: Any, user: Any, *, changed: bool = False) -> None:
    """Remembers an object whose prompts run with a model's head, for as long as it lives or until it leaves it.

    Args:
        user: a :class:`SoftPromptModel`, or another object that has ``names`` of prompts.
        changed: whether the head is known to be another than the base's own.
    """
    base = without_adapters(model)
    with _lock:
        head = _heads.get(base) or _Head(base)
        head.users.add(user)
        head.changed |= changed
        _heads[base] = head


def leave_head(model: Any, user: Any) -> None:
    """Forgets an object of :func:`use_head`."""
    with _lock:
        head = _heads.get(without_adapters(model))
        if head is not None:
            head.users.discard(user)


def head_changed(model: Any) -> bool:
    """Whether a model's head was trained or replaced since the first object used it. A change by ``.data`` is not seen.

    Nothing waits for a GPU, because no numbers are read.
    """
    base = without_adapters(model)
    with _lock:
        head = _heads.get(base)
        return head is not None and (head.changed or head.first != _versions(base))


def prompts_of_others(model: Any, user: Any) -> list[str]:
    """The names of the prompts that other living objects run with a model's head."""
    with _lock:
        head = _heads.get(without_adapters(model))
        if head is not None and any(_names(other) for other in head.users if other is not user):
            gc.collect()  # an object that nobody can reach any more may not be freed yet
        users = [] if head is None else [other for other in head.users if other is not user]
    return sorted({name for other in users for name in _names(other)})


def _names(user: Any) -> Iterable[str]:
    names: Iterable[str] = getattr(getattr(user, "prompts", user), "names", ())
    return names


def _versions(base: nn.Module) -> list[int | None]:
    """How often each tensor of the head was written to."""
    parameters = head_parameters(base, loadable_modules(base))
    return [None if parameter.is_inference() else parameter._version for parameter in parameters]
