"""JSON and JSON lines: rows keep JSON's types, and dates stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LINE_END = re.compile(r"\r\n|\n|\r")
"""No other character that Python takes for the end of a line: these may be part of a text."""
Read = tuple[list[dict[str, Any]], list[int]]
"""Rows, and the line (JSON lines) or the number (JSON) of each, counted from 1."""


def read_json_lines(text: str, name: str) -> Read:
    """An object per line. A comma after an object is no part of it.

    Raises:
        ValueError: a line that is no JSON object, or that names a column twice, with its number.
    """
    if text.lstrip().startswith("["):
        return read_json(text, name)
    rows, numbers = [], []
    for number, line in enumerate(LINE_END.split(text), 1):
        line = line.strip()
        if not line:
            continue
        place = f"{name}, line {number}"
        row = _parsed(line[:-1] if line.endswith("},") else line, place)
        rows.append(_checked(row, place))
        numbers.append(number)
    return _filled(rows), numbers


def read_json(text: str, name: str) -> Read:
    """A list of objects, alone or as the only list under a name, or lists of equal lengths by column.

    Raises:
        ValueError: other contents, naming what they are.
    """
    if not text.strip():
        return [], []
    try:
        data = _parsed(text, name)
    except ValueError as error:
        if "Extra data" in str(error) and not text.lstrip().startswith("["):
            return read_json_lines(text, name)  # lines with the other suffix
        raise
    if isinstance(data, Mapping):
        data = _rows_of(data, name)
    if not isinstance(data, list):
        raise ValueError(f"{name} must hold a list of rows, got {type(data).__name__}")
    rows = [_checked(row, f"{name}, row {number}") for number, row in enumerate(data, 1)]
    return _filled(rows), list(range(1, len(rows) + 1))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, place))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{place}: nested too deeply") from error
    except ValueError as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: a number with too many digits ({error})") from error


def _object(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        double = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{place}: an object must name each column once, got {', '.join(map(repr, double))} twice")
    return made


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object with columns, got {type(row).__name__}")
    return row


def _rows_of(data: Mapping[str, Any], name: str) -> Any:
    """The rows of an object: of the one list of objects in it, or by columns or numbers, as pandas writes them."""
    if not data:
        return []
    tables = [key for key, value in data.items() if isinstance(value, list) and value and _objects(value)]
    if len(tables) == 1 and not any(isinstance(value, list) for key, value in data.items() if key != tables[0]):
        return data[tables[0]]
    if set(data) >= {"columns", "data"} and set(data) <= {"columns", "data", "index"}:
        return [dict(zip(data["columns"], values, strict=True)) for values in data["data"]]
    columns = list(data.values())
    several_tables = len(tables) > 1 and len(tables) == len(data)
    if columns and all(isinstance(column, list) for column in columns) and not several_tables:
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{key!r}: {len(value)}" for key, value in data.items())
            raise ValueError(f"{name} must have columns of one length, got {lengths}")
        return [dict(zip(data, values, strict=True)) for values in zip(*columns, strict=True)]
    if columns and all(isinstance(column, dict) for column in columns):
        if _counted(data) and not any(_counted(column) for column in columns):
            return columns
        if not all(_counted(column) for column in columns):
            raise ValueError(
                f"{name} can be read by rows or by columns ({', '.join(map(repr, list(data)[:3]))}, ...); make it a "
                "list of rows (orient='records' in pandas)"
            )
        if any(list(column) != list(columns[0]) for column in columns):
            raise ValueError(f"{name} must have columns with the same rows, got others in some")
        return [{key: column[row] for key, column in data.items()} for row in columns[0]]
    if columns and not any(isinstance(column, (list, dict)) for column in columns):
        return [data]
    raise ValueError(
        f"{name} must hold a list of rows, got an object with {', '.join(map(repr, data))}; "
        "put the rows' list alone in a file"
    )


def _counted(data: Mapping[str, Any]) -> bool:
    """Whether the keys are numbers of rows."""
    return all(key.isdecimal() for key in data)


def _objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with all columns; a column that only other rows have is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    if all(len(row) == len(names) for row in rows):
        return rows
    empty: dict[str, Any] = dict.fromkeys(names)
    return [empty | row for row in rows]
