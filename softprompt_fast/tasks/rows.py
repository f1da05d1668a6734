"""Rows of data that know the file and line where they were read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

if TYPE_CHECKING:
    import pyarrow as pa

Examples = list[dict[str, Any]]
"""Rows of data; each maps columns to values. Rows that were read from a file are :class:`Rows`."""
LINES_SHOWN = 5
"""Lines of a file that a warning names."""


class Origin(NamedTuple):
    """Where a row was read."""

    file: str
    unit: str
    """"line", or "row" in files that have no lines."""
    number: int
    """Counted from 1."""

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class Rows(Examples):
    """Rows that know where they were read; a slice or a choice of them knows it too.

    Args:
        origins: of each row.
        table: the same rows with the types of their file, if the file has types.
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]] = (), origins: Sequence[Origin] = (), table: pa.Table | None = None
    ) -> None:
        super().__init__(rows)
        if len(origins) != len(self):
            raise ValueError(f"`origins` must be one for each of {len(self)} rows, got {len(origins)}")
        self.origins, self.table = list(origins), table

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return self.choose(range(*index.indices(len(self))))
        return super().__getitem__(index)

    def choose(self, indices: Sequence[int]) -> Rows:
        """The rows of these indices, in this order."""
        table = None if self.table is None else self.table.take(list(indices))
        return Rows([self[i] for i in indices], [self.origins[i] for i in indices], table)


def choose(rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> Examples:
    """The rows of these indices, in this order. They keep their origin if they have one."""
    return rows.choose(indices) if isinstance(rows, Rows) else [dict(rows[i]) for i in indices]


def place(rows: Sequence[Mapping[str, Any]], index: int) -> str:
    """Where a row is, for messages: its file and line, or its place in a list, counted from 0."""
    return str(rows.origins[index]) if isinstance(rows, Rows) else f"row {index}"


def file_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names, without their folders, of the files and datasets that rows were read from."""
    origins = rows.origins if isinstance(rows, Rows) else []
    return list(dict.fromkeys(PurePath(origin.file).name for origin in origins))


def places(rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> str:
    """Where some rows are, for messages: the first few, in the order of the file."""
    if isinstance(rows, Rows):
        origins = sorted(rows.origins[i] for i in indices)
        files = list(dict.fromkeys(origin.file for origin in origins))
        numbers = [str(origin.number) if len(files) == 1 else str(origin) for origin in origins[:LINES_SHOWN]]
        unit = f"{origins[0].unit}{'s' if len(indices) > 1 else ''} "
        start = f"{files[0]}, {unit}" if len(files) == 1 else ""
    else:
        numbers = [str(i) for i in sorted(indices)[:LINES_SHOWN]]
        start = "rows " if len(indices) > 1 else "row "
    return start + ", ".join(numbers) + (" and others" if len(indices) > LINES_SHOWN else "")


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that any row has."""
    return list(dict.fromkeys(name for row in rows for name in row))


def grouped(rows: Examples, key: Callable[[int], str]) -> dict[str, Examples]:
    """The rows of each group, in the order in which the groups appear.

    Args:
        key: the group of the row of an index.
    """
    groups: dict[str, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(key(index), []).append(index)
    return {group: choose(rows, indices) for group, indices in groups.items()}


def joined(*parts: Examples) -> Examples:
    """Rows of several lists, one after the other, without the types of their files."""
    rows = [row for part in parts for row in part]
    if not all(isinstance(part, Rows) or not part for part in parts):
        return rows
    return Rows(rows, [origin for part in parts if isinstance(part, Rows) for origin in part.origins])
