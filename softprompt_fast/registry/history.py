"""Which versions an alias named, one after the other: a promotion adds one, a rollback takes the last one away."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

PROMOTE, ROLLBACK = "promote", "rollback"
PREFIX = "softprompt_fast.move"
MOVES_SHOWN = 10
"""Moves that a table of versions ends with."""


@dataclass(frozen=True)
class Move:
    """An alias was moved to another version."""

    action: str
    """"promote" or "rollback"."""
    name: str
    alias: str
    before: int | None
    """The version that the alias named before; None: none."""
    after: int
    author: str
    at: str
    """Time, in UTC."""
    forced: str = ""
    """What spoke against it, if it was forced."""

    def tag(self) -> tuple[str, str]:
        """The registered name's tag that records the move: the key sorts by time."""
        key = f"{PREFIX}.{self.alias}.{time.time_ns():020d}.{uuid.uuid4().hex[:8]}"
        return key, json.dumps(asdict(self))


def moves(tags: Mapping[str, str], alias: str) -> list[Move]:
    """All recorded moves of an alias, the oldest first."""
    return [Move(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(f"{PREFIX}.{alias}.")]


def promoted(recorded: Sequence[Move], current: int | None) -> list[int]:
    """The versions to which a rollback can return, and the current one at the end.

    An alias can move without a record: in MLflow's own pages, or if a process is killed between the two. What the
    alias really named counts.
    """
    stack: list[int] = []
    for move in recorded:
        _move_to(stack, move.before)
        if move.action == ROLLBACK:
            _move_to(stack, move.after)
        elif stack[-1:] != [move.after]:
            stack.append(move.after)
    _move_to(stack, current)
    return stack


def _move_to(stack: list[int], version: int | None) -> None:
    """Makes a version the last one: by a step back if it is the last but one, else by a step forward."""
    if version is None or stack[-1:] == [version]:
        return
    if stack[-2:-1] == [version]:
        stack.pop()
    else:
        stack.append(version)
