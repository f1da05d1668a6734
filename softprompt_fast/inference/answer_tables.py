"""Rows and their answers as one csv or parquet file; the rows' own columns are written as they were read."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.examples import Examples
from ..tasks.rows import Rows, columns_of
from ..tasks.values import is_missing, plain

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = (".jsonl", ".csv", ".parquet")


def write_table(rows: Examples, answers: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Writes a csv or parquet file that appears when it is complete.

    Args:
        answers: the columns that each row gets; mappings and lists in them become JSON in csv.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    if output.suffix.lower() == ".csv":
        _write_csv(rows, answers, partial)
    else:
        import pyarrow.parquet as pq

        pq.write_table(_table(rows, answers), partial)
    os.replace(partial, output)


def _write_csv(rows: Examples, answers: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys([*columns_of(rows), *_columns(answers)]))
    line = io.StringIO(newline="")
    # With this end of line the writer quotes both kinds of line breaks.
    writer = csv.writer(line, lineterminator="\r\n")
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        for values in (dict(zip(names, names, strict=True)), *map(_joined, rows, answers)):
            writer.writerow([_cell(values.get(name)) for name in names])
            file.write(line.getvalue().removesuffix("\r\n") + "\n")
            line.seek(0)
            line.truncate()


def _joined(row: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **answer}


def _columns(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of all answers; ``error`` comes last."""
    names = columns_of(answers)
    return sorted(names, key=lambda name: name.startswith("error"))


def _cell(value: Any) -> str:
    value = plain(value)
    if is_missing(value) and not isinstance(value, str):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(rows: Examples, answers: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows in the types of their file, and the answers after them."""
    import pyarrow as pa

    table = rows.table if isinstance(rows, Rows) else None
    if table is None:
        table = pa.table({name: _array([row.get(name) for row in rows]) for name in columns_of(rows)})
    for name in _columns(answers):
        table = table.append_column(name, _array([answer.get(name) for answer in answers]))
    return table


def _array(values: list[Any]) -> pa.Array:
    """A column in the type of its values; as JSON text if they have none in common."""
    import pyarrow as pa

    try:
        if any(isinstance(value, bool) for value in values) and not all(
            value is None or isinstance(value, bool) for value in values
        ):
            raise TypeError("booleans among other values")
        array = pa.array(values, from_pandas=True)
        return array.cast(pa.string()) if pa.types.is_null(array.type) else array
    except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
        texts = [None if is_missing(value) and not isinstance(value, str) else _cell(value) for value in values]
        return pa.array([text and text.encode(errors="replace").decode() for text in texts], pa.string())
