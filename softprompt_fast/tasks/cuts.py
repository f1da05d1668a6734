"""Counts of texts and responses that were cut to ``max_length``, and the one log line about them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

logger = logging.getLogger("softprompt_fast")


@dataclass
class Cuts:
    """Texts and responses that were encoded, and how many of them were cut."""

    texts: int = 0
    cut_texts: int = 0
    responses: int = 0
    cut_responses: int = 0
    rows: int = 0
    """Rows that are read in parts if they are long."""
    parted_rows: int = 0
    max_length: int = 0
    """The longest limit that cut one."""

    def count_text(self, cut: bool, max_length: int) -> None:
        self.texts += 1
        self.cut_texts += cut
        self.max_length = max(self.max_length, max_length if cut else 0)

    def count_response(self, cut: bool, max_length: int) -> None:
        self.responses += 1
        self.cut_responses += cut
        self.max_length = max(self.max_length, max_length if cut else 0)

    def count_part(self, parted: bool) -> None:
        self.rows += 1
        self.parted_rows += parted

    def log(self) -> None:
        """One warning with the counts, if anything was cut, and a line about rows that are read in parts."""
        if self.parted_rows:
            logger.info("%d of %d rows are longer than max_length and read in parts", self.parted_rows, self.rows)
        parts = []
        if self.cut_texts:
            parts.append(f"{self.cut_texts} of {self.texts} texts lose their beginning (the template's words stay)")
        if self.cut_responses:
            parts.append(f"{self.cut_responses} of {self.responses} responses lose their end and their end token")
        if parts:
            logger.warning("longer than max_length=%d tokens: %s", self.max_length, ", ".join(parts))


_current: ContextVar[Cuts | None] = ContextVar("cuts", default=None)


def current_cuts() -> Cuts:
    """The counts that are being taken now, or counts that nobody reads."""
    return _current.get() or Cuts()


@contextmanager
def counting_cuts(*, log: bool = True) -> Iterator[Cuts]:
    """Counts cuts in its block. The outermost block logs one line; ``log=False`` counts apart and logs nothing."""
    outer = _current.get()
    cuts = outer if outer is not None and log else Cuts()
    token = _current.set(cuts)
    try:
        yield cuts
    finally:
        _current.reset(token)
        if outer is None and log:
            cuts.log()
