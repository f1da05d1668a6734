"""Answers to the rows of a file, written as they come: an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..tasks.examples import Examples
from ..tasks.rows import columns_of
from ..tasks.values import plain
from .answer_tables import FORMATS, write_table
from .pipeline import SoftPromptPipeline
from .requests import Result

logger = logging.getLogger("softprompt_fast")

Answers = Callable[[int], Iterator[list[Result]]]
"""Called with the index of a row; gives the results of that row and all after it, in order, in lists of any lengths."""
COLUMNS = ("prediction", "scores", "score", "start", "end", "agreement", "generated", "error")
"""Columns that answers add. Those that the rows have already keep their values: the answers' get a number (_2)."""


class Written(NamedTuple):
    """What a run has done; rows that an earlier run has answered do not count."""

    rows: int
    errors: int
    """Rows that got an error instead of an answer."""


def answer_rows(
    pipeline: SoftPromptPipeline,
    rows: Examples,
    names: Sequence[str | None],
    generation_options: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Answers each row as its prompt's task asks: ``prediction`` and ``scores``, or a generated ``prediction``."""
    tasks = [pipeline.bank.task(name) if name is not None and name in pipeline.bank else None for name in names]
    generating = [task is not None and task.kind == "generation" for task in tasks]
    results: list[Result] = [{} for _ in rows]
    mine = [i for i, generates in enumerate(generating) if not generates]
    for i, result in zip(mine, pipeline.classify([rows[i] for i in mine], [names[i] for i in mine]), strict=True):
        results[i] = result
    mine = [i for i, generates in enumerate(generating) if generates]
    options = {"do_sample": False, "max_new_tokens": 64} | dict(generation_options or {})
    generated = pipeline.generate([rows[i] for i in mine], [names[i] for i in mine], **options)
    for i, result in zip(mine, generated, strict=True):
        results[i] = {"prediction": result["text"]} if "text" in result else result
    return results


def in_chunks(
    answer: Callable[[Examples, Sequence[str | None]], list[Result]],
    rows: Examples,
    names: Sequence[str | None],
    chunk: int = 256,
) -> Answers:
    """Answers by a function of rows and their prompts, `chunk` rows at a time: an interruption loses at most these."""

    def answers(start: int) -> Iterator[list[Result]]:
        for at in range(start, len(rows), chunk):
            yield answer(rows[at : at + chunk], names[at : at + chunk])

    return answers


def check_output(output: Path, source: str | None = None, *, resume: bool = False) -> None:
    """Checks that answers can be written, before any work.

    Args:
        source: the file or folder that the rows come from.

    Raises:
        FileExistsError: there are answers already, and ``resume`` is False.
        ValueError: an unknown format, or the file of the rows.
    """
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"`output` must end in {', '.join(FORMATS)}, got {output.name!r}")
    rows = None if source is None else Path(source)
    if rows is not None and rows.exists():
        for file in (output, _lines_of(output)):
            if file.exists() and file.samefile(rows):
                raise ValueError(f"`output` must be another file than the one of the rows, got {output}")
        if rows.is_dir() and output.parent.exists() and output.parent.samefile(rows):
            raise ValueError(f"`output` must not be in the folder of the rows, got {output}")
    if output.is_dir():
        raise ValueError(f"`output` must be a file, got the folder {output}")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"`output` must be in a folder, got {output}, and {folder} is a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"`output` must be in a folder that can be written to, got {output}")
    if not resume and (output.exists() or _lines_of(output).exists()):
        raise FileExistsError(f"{output} already holds answers; resume, or choose another file")


def write_answers(
    rows: Examples,
    answers: Answers,
    output: Path,
    *,
    resume: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes each row's columns and its answer, in the order of rows, as answers come.

    Args:
        answers: gives results from a row on.
        output: .jsonl, .csv or .parquet. For the last two, answers are kept in ``<output>.partial.jsonl`` until all
            rows are answered.
        resume: continue after the rows that an interrupted run has written.
        done: called with numbers of rows.

    Returns:
        How many rows this run has answered, and how many of them got an error instead of an answer.

    Raises:
        FileExistsError: there are answers already, and ``resume`` is False.
        ValueError: the written rows are not those of ``rows``.
    """
    check_output(output, resume=resume)
    lines = _lines_of(output)
    if resume and lines != output and output.exists():
        _check_table(output, rows)
        return Written(0, 0)
    output.parent.mkdir(parents=True, exist_ok=True)
    finished = _finished(lines, rows)
    done(finished)
    with lines.open("ab") as file:
        written = write_lines(rows, answers, file, start=finished, sync=True, done=done)
    if lines != output:
        names = list(answer_names(rows).values())
        write_table(rows, [{name: row[name] for name in names if name in row} for row in _read(lines)], output)
        lines.unlink()
    return written


def write_lines(
    rows: Examples,
    answers: Answers,
    file: IO[bytes],
    *,
    start: int = 0,
    sync: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> Written:
    """Writes rows with their answers as JSON lines, as answers come; NaN is null.

    Args:
        start: index of the first row.
        sync: after each list of results, wait until it is on the disk.
    """
    names = answer_names(rows)
    renamed = [f"{name!r} as {new!r}" for name, new in names.items() if name != new]
    if renamed:
        logger.warning(
            "the rows have columns of these names already; answers are written under others: %s", ", ".join(renamed)
        )
    at, errors = start, 0
    for results in answers(start):
        for row, result in zip(rows[at : at + len(results)], results, strict=True):
            errors += "error" in result
            file.write(_line(row | {names.get(name, name): value for name, value in result.items()}))
        file.flush()
        if sync:
            os.fsync(file.fileno())
        done(len(results))
        at += len(results)
    return Written(at - start, errors)


def answer_names(rows: Examples) -> dict[str, str]:
    """The name under which each of :data:`COLUMNS` is written: its own, or one that the rows do not have."""
    taken = set(columns_of(rows))
    names = {}
    for name in COLUMNS:
        new, number = name, 1
        while new in taken:
            number += 1
            new = f"{name}_{number}"
        names[name] = new
    return names


def _lines_of(output: Path) -> Path:
    """The file that answers are written to line by line."""
    return output if output.suffix.lower() == ".jsonl" else output.with_name(output.name + ".partial.jsonl")


def _line(row: Mapping[str, Any]) -> bytes:
    values = plain(row)
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair can be written as an escape only
        return json.dumps(values, allow_nan=False).encode() + b"\n"


def _finished(lines: Path, rows: Examples) -> int:
    """Number of rows that an earlier run has written completely; the rest of a line that was cut off is removed."""
    if not lines.exists():
        return 0
    whole = count = 0
    with lines.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                written = plain(json.loads(line))
            except ValueError as error:
                raise ValueError(f"cannot resume: {lines}, line {count + 1} is not JSON ({error})") from error
            expected = plain(rows[count]) if count < len(rows) else None
            if expected is None or any(name not in written or written[name] != expected[name] for name in expected):
                raise ValueError(
                    f"cannot resume: {lines} holds answers to other rows, its line {count + 1} is another row"
                )
            whole += len(line)
            count += 1
        file.truncate(whole)
    return count


def _check_table(output: Path, rows: Examples) -> None:
    """Refuses a finished table that holds answers to other rows."""
    from ..tasks.tables import load_rows

    written = load_rows(str(output), delimiter=",")
    if len(written) != len(rows) or any(
        isinstance(value, str) and value.encode(errors="replace").decode() != (found.get(name) or "")
        for row, found in zip(rows, written, strict=True)
        for name, value in row.items()
    ):
        raise ValueError(f"cannot resume: {output} is finished and holds answers to other rows")


def _read(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
