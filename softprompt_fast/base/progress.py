"""Progress over rows: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

LINE_SECONDS = 5.0
"""Time between two lines where the output is not a terminal."""


@contextmanager
def progress_bar(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Shows progress over ``total`` rows; yields a function that takes the number of rows done since its last call."""
    if not console.is_terminal:
        yield _lines(total, console)
        return
    from rich.progress import Progress

    with Progress(console=console) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda done: bar.advance(task, done)


def _lines(total: int, console: Console) -> Callable[[int], None]:
    finished, printed = 0, time.perf_counter()

    def advance(done: int) -> None:
        nonlocal finished, printed
        finished += done
        if (now := time.perf_counter()) - printed >= LINE_SECONDS:
            printed = now
            console.print(f"{finished}/{total} rows", highlight=False)

    return advance
