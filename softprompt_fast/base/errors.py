"""Errors that several packages raise or catch."""

from __future__ import annotations


class Unsupported(RuntimeError):
    """The packed layout cannot run exactly; the message says why."""


class PackedFailure(RuntimeError):
    """A model failed on a packed batch whose arguments had been checked; ``__cause__`` is its error."""
