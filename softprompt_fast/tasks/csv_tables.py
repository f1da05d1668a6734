"""csv and tsv: every cell is the text in the file, and every row has the header's number of fields."""

from __future__ import annotations

import csv
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("softprompt_fast")

DELIMITERS = (",", ";", "\t", "|")
SHOWN = 5
"""Lines that an error names."""
SEEN, WORDS = 1000, 8
"""Rows that are compared with the names of the columns; a longer name in words is a text."""
NO_HEADER = "if the file has no header, give `header=False` (--no-header)"
LIMIT = sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1
"""Longest cell; Python's own limit is 131,072 characters."""


@dataclass
class Record:
    """One row of a file."""

    line: int
    """Its first line, counted from 1."""
    fields: list[str]
    raw: str
    """Its text, with quotes and line breaks."""


def read_csv(
    text: str, name: str, *, tabs: bool, delimiter: str | None = None, header: bool = True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows and their lines. An empty cell is None; every other cell is its text.

    Args:
        name: of the file, for messages.
        tabs: the file is tab-separated; quotes may then be part of the text, as the file itself shows.
        delimiter: None: found from the first row and from the number of fields in each row.
        header: the first row names the columns. Without a header they are called 1, 2, 3 and so on.

    Raises:
        ValueError: rows of other lengths than the header, torn quotes, or duplicate names, with their lines.
    """
    lines = list(io.StringIO(text, newline=""))
    first = 0
    if lines and (match := re.fullmatch(r'"?sep=(.)"?\s*', lines[0], re.IGNORECASE)):
        delimiter, first = delimiter or match[1], 1
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"`delimiter` must be one character, not a quote or a line break, got {delimiter!r}")
    body = _Body(lines[first:], first + 1, name, header)
    if tabs and delimiter is None:
        delimiter = "\t"
    if delimiter is None:
        delimiter = _find_delimiter(body)
    return _table(_tab_separated(body) if delimiter == "\t" else body.records(delimiter), body, delimiter)


@dataclass
class _Body:
    """The lines of a file after ``sep=``."""

    lines: list[str]
    start: int
    """Line of the file at which they begin, counted from 1."""
    name: str
    header: bool

    def names(self, records: Sequence[Record]) -> list[str]:
        """The names of the columns, without the empty ones that a separator at the end of the header makes."""
        if not self.header:
            return [str(number) for number in range(1, len(records[0].fields) + 1)]
        names = list(records[0].fields)
        while len(names) > 1 and not names[-1].strip():
            names.pop()
        return names

    def misfits(self, records: Sequence[Record]) -> list[Record]:
        """Rows of another length than the first. Empty fields after the last do not count."""
        width = len(self.names(records))
        return [record for record in records[1:] if len(record.fields) < width or any(record.fields[width:])]

    def records(self, delimiter: str, *, quotes: bool = True) -> list[Record]:
        """All rows with content.

        Raises:
            ValueError: quotes that do not enclose a whole field.
        """
        reader = csv.reader(
            self.lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, strict=True
        )
        records, before = [], 0
        old = csv.field_size_limit(LIMIT)
        try:
            for fields in reader:
                if fields:
                    raw = "".join(self.lines[before : reader.line_num])
                    records.append(Record(self.start + before, fields, raw))
                before = reader.line_num
        except csv.Error as error:
            raise ValueError(
                f"{self.name}, line {self.start + before}: the quotes of a field are torn ({error}); a field with "
                'quotes, separators or line breaks is enclosed in ", and a quote in it is doubled'
            ) from error
        finally:
            csv.field_size_limit(old)
        return records


def _find_delimiter(body: _Body) -> str:
    """The separator with which every row has as many fields as the header; else the one that the header has."""
    header = next((line for line in body.lines if line.strip()), "")
    in_header = [delimiter for delimiter in DELIMITERS if delimiter in header]
    fitting = [delimiter for delimiter in in_header if _fits(body, delimiter)]
    if len(fitting) > 1:
        raise ValueError(
            f"{body.name} can be read with {' or '.join(map(repr, fitting))} between its fields; give `delimiter`"
        )
    return (fitting or in_header or [","])[0]


def _fits(body: _Body, delimiter: str, *, quotes: bool = True) -> bool:
    try:
        records = body.records(delimiter, quotes=quotes)
    except ValueError:
        return False
    return bool(records) and len(records[0].fields) > 1 and not body.misfits(records)


def _tab_separated(body: _Body) -> list[Record]:
    """Rows of a tab-separated file, with its quotes read as its writer meant them.

    A writer that quotes does so where a cell holds a quote, a tab or a line break, or for all texts. In a file where
    quotes follow neither rule they are part of the text.
    """
    if not any('"' in line for line in body.lines):
        return body.records("\t", quotes=False)
    try:
        quoted = body.records("\t")
    except ValueError:
        quoted = None
    if quoted is not None and _written_with_quotes(quoted):
        return quoted
    return body.records("\t", quotes=False)


def _written_with_quotes(records: Sequence[Record]) -> bool:
    cells = [cell for record in records for cell in _raw_cells(record.raw) if cell != '""']
    for special in ('"\t\r\n', '"\t\r\n,'):  # a spreadsheet also quotes cells with a comma
        if all(cell.startswith('"') == any(c in special for c in _content(cell)) for cell in cells):
            return True
    return all(cell.startswith('"') or not cell or _is_number(cell) for cell in cells)


def _content(cell: str) -> str:
    return cell[1:-1] if cell.startswith('"') else cell


def _raw_cells(raw: str) -> Iterator[str]:
    """The cells of a tab-separated row, in their quotes."""
    for match in re.finditer(r'("(?:[^"]|"")*"(?=[\t\r\n]|$)|[^\t\r\n]*)(?:\t|[\r\n]+$|$)', raw):
        if match.start() < len(raw):
            yield match[1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(records: list[Record], body: _Body, delimiter: str) -> tuple[list[dict[str, Any]], list[int]]:
    name = body.name
    if len(records) < 1 + body.header:
        raise ValueError(f"{name} holds no rows" + ("" if not records else " after its header"))
    names = body.names(records)
    if double := sorted({column for column in names if names.count(column) > 1}):
        raise ValueError(
            f"{name}, line {records[0].line}: the header must name each column once, got "
            f"{', '.join(map(repr, double))} more than once; {NO_HEADER}"
        )
    if wrong := body.misfits(records):
        shown = ", ".join(f"line {r.line} has {len(r.fields)}" for r in wrong[:SHOWN])
        first = f"header ({', '.join(names)})" if body.header else "first row"
        raise ValueError(
            f"{name}: {len(wrong)} of {len(records) - body.header} rows do not have the {len(names)} fields of the "
            f"{first}, separated by {delimiter!r}: {shown}{' and others' if len(wrong) > SHOWN else ''}; "
            "a field with separators in it is enclosed in quotes, and `delimiter` (--delimiter) gives another separator"
        )
    if body.header:
        if data := _like_data(names, records[1:]):
            logger.warning(
                "%s, line %d names the columns, but looks like data (%r); %s", name, records[0].line, data, NO_HEADER
            )
        records = records[1:]
    width = len(names)
    rows = [dict(zip(names, (cell or None for cell in record.fields[:width]), strict=True)) for record in records]
    return rows, [record.line for record in records]


def _like_data(names: Sequence[str], records: Sequence[Record]) -> str | None:
    """A name of a column that is a value: it recurs in its column, is a number among numbers, or is a sentence."""
    counted = all(name == str(place) for place, name in enumerate(names, int(names[0] == "1")))
    for place, name in enumerate(names):
        cells = [record.fields[place] for record in records[:SEEN]]
        number = _is_number(name) and not counted and all(_is_number(cell) for cell in cells if cell)
        if (name.strip() and name in cells) or number or len(name.split()) > WORDS:
            return name
    return None
