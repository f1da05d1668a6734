"""The progress bar over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def progress_bar(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Shows a bar over ``total`` rows; yields a function that takes the number of rows done since its last call."""
    from rich.progress import Progress

    with Progress(console=console) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda done: bar.advance(task, done)
