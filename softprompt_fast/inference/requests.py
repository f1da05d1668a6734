"""Requests of a pipeline: divided into units of work, run in batches of similar lengths, answered one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("softprompt_fast")

Result = dict[str, Any]
OnResult = Callable[[int, Result], None]
"""Called with the index of a text and its result."""


@dataclass(eq=False)
class Unit:
    """One run of the model on one text with one prompt."""

    row: int
    """Index of the text."""
    member: int
    """Which of the request's units it is."""
    prompt: str | None
    ids: list[int]
    target: list[int] = field(default_factory=list)
    """Tokens whose log-probabilities are asked for, one after the other, starting after `ids`."""
    choices: list[tuple[int, list[int]]] | None = None
    """Or: what is asked for is how likely these tokens follow `ids` and so many tokens of the target."""

    @property
    def length(self) -> int:
        """Tokens that a decoder reads: the last target token is predicted, not read."""
        return len(self.ids) + max(0, len(self.target) - 1)


@dataclass(eq=False)
class Request:
    """A text and what is to be done with it."""

    units: list[Unit]
    finish: Callable[[list[Any]], Result]
    """Makes the request's result of the results of all its units."""
    results: dict[int, Any] = field(default_factory=dict)
    """By member."""


Run = Callable[[list[Unit]], list[Any]]
"""Runs a batch; returns a result for each unit."""


def answer(
    count: int,
    prepare: Callable[[int], Request],
    run: Run,
    *,
    max_rows: int,
    max_tokens: int,
    on_result: OnResult | None = None,
    progress: bool = False,
) -> list[Result]:
    """Results of `count` requests, in their order.

    Args:
        prepare: makes the request of an index; its error becomes that request's result.
        run: runs a batch of units; if it fails, its units are run one by one.
        max_rows, max_tokens: bounds of a batch.
        on_result: sees each result as soon as there is one.
        progress: show a bar.
    """
    results: list[Result] = [{} for _ in range(count)]

    def done(index: int, result: Result) -> None:
        results[index] = result
        if on_result is not None:
            on_result(index, result)
        if bar is not None:
            bar.advance(task)

    bar, task = _bar(count) if progress else (None, None)
    try:
        requests: dict[int, Request] = {}
        for index in range(count):
            try:
                requests[index] = prepare(index)
            except Exception as error:  # whatever is wrong with one row, the others are answered
                done(index, _failure(error))
        units = [unit for request in requests.values() for unit in request.units]
        for batch in batches(units, max_rows, max_tokens):
            for unit, result in zip(batch, _attempt(batch, run), strict=True):
                request = requests.get(unit.row)
                if request is None:
                    continue
                request.results[unit.member] = result
                if isinstance(result, Exception):
                    done(unit.row, _failure(result))
                    del requests[unit.row]
                elif len(request.results) == len(request.units):
                    done(unit.row, _finish(request))
                    del requests[unit.row]
    finally:
        if bar is not None:
            bar.stop()
    return results


def batches(units: Sequence[Unit], max_rows: int, max_tokens: int) -> Iterator[list[Unit]]:
    """Units of similar length together, longest first: a batch that does not fit into memory shows at the start."""
    batch: list[Unit] = []
    for unit in sorted(units, key=lambda unit: -unit.length):
        widest = batch[0].length if batch else 0
        if batch and (len(batch) == max_rows or widest * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _attempt(batch: list[Unit], run: Run) -> list[Any]:
    """A batch's results. If it fails, its units run one by one, and a unit that fails gets its error as result."""
    try:
        return run(batch)
    except Exception as error:
        if len(batch) == 1:
            return [error]
        logger.warning("a batch of %d rows failed (%s); its rows are tried one by one", len(batch), error)
        return [result for unit in batch for result in _attempt([unit], run)]


def _finish(request: Request) -> Result:
    try:
        return request.finish([request.results[member] for member in sorted(request.results)])
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Result:
    """The message of an error; a KeyError's own text is in quotes."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return {"error": message or type(error).__name__}


def _bar(count: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    bar.start()
    return bar, bar.add_task("rows", total=count)
