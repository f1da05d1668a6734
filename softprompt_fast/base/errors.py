"""Errors that several packages raise or catch."""

from __future__ import annotations

from collections.abc import Sequence


class Unsupported(RuntimeError):
    """The packed layout cannot run exactly; the message says why."""


class PackedFailure(RuntimeError):
    """A model failed on a packed batch whose arguments had been checked; ``__cause__`` is its error."""


def either(names: Sequence[str]) -> str:
    """The names as a choice: "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
