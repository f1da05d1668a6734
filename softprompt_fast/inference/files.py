"""Answers to the rows of a file, written as they come: an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks.examples import Examples
from .pipeline import SoftPromptPipeline
from .requests import Result

Answers = Callable[[int], Iterator[list[Result]]]
"""Called with the index of a row; gives the results of that row and all after it, in order, in lists of any lengths."""
FORMATS = (".jsonl", ".csv", ".parquet")


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


def write_answers(
    rows: Examples,
    answers: Answers,
    output: Path,
    *,
    resume: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes each row's columns and its answer, in the order of rows, as answers come.

    Args:
        answers: gives results from a row on.
        output: .jsonl, .csv or .parquet. For the last two, answers are kept in ``<output>.partial.jsonl`` until all
            rows are answered.
        resume: continue after the rows that an interrupted run has written.
        done: called with numbers of rows.

    Returns:
        How many rows got an error instead of an answer.

    Raises:
        FileExistsError: there are answers already, and ``resume`` is False.
        ValueError: the written rows are not those of ``rows``.
    """
    if output.suffix not in FORMATS:
        raise ValueError(f"`output` must end in {', '.join(FORMATS)}, got {output.name!r}")
    lines = output if output.suffix == ".jsonl" else output.with_name(output.name + ".partial.jsonl")
    if not resume and (output.exists() or lines.exists()):
        raise FileExistsError(f"{output} already holds answers; resume, or choose another file")
    if resume and lines != output and output.exists():
        return 0
    finished = _finished(lines, rows)
    done(finished)
    with lines.open("ab") as file:
        at = finished
        for results in answers(at):
            for row, result in zip(rows[at : at + len(results)], results, strict=True):
                file.write(json.dumps(row | result, ensure_ascii=False, default=_plain).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            done(len(results))
            at += len(results)
    errors = sum("error" in json.loads(line) for line in lines.open(encoding="utf-8"))
    if lines != output:
        _convert(lines, output)
    return errors


def _finished(lines: Path, rows: Examples) -> int:
    """Number of rows that an earlier run has written completely; the rest of a line that was cut off is removed."""
    if not lines.exists():
        return 0
    whole = 0
    with lines.open("rb+") as file:
        for count, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            written = json.loads(line)
            expected = json.loads(json.dumps(dict(rows[count]), default=_plain)) if count < len(rows) else None
            if expected is None or any(written.get(key) != value for key, value in expected.items()):
                raise ValueError(
                    f"cannot resume: {lines} holds answers to other rows, its line {count + 1} is another row"
                )
            whole += len(line)
        file.truncate(whole)
    with lines.open("rb") as file:
        return sum(1 for _ in file)


def _convert(lines: Path, output: Path) -> None:
    """Writes all lines as one table; a row's scores become text in csv."""
    import pandas as pd

    table = pd.DataFrame(list(_read(lines)))
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    if output.suffix == ".csv":
        for column in table:
            table[column] = [
                json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v for v in table[column]
            ]
        table.to_csv(partial, index=False)
    else:
        table.to_parquet(partial, index=False)
    os.replace(partial, output)
    lines.unlink()


def _read(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _plain(value: Any) -> Any:
    """Numpy arrays as lists, and other values (such as dates) as text, for JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
