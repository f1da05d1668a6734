"""Random tables through every format and back: what was written is what is read, and what goes in comes out."""

# ruff: noqa: E501 (a line for each list)

from __future__ import annotations

import csv
import datetime
import io
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softprompt_fast.inference.files import answer_names, in_chunks, write_answers
from softprompt_fast.tasks.tables import load_rows
from softprompt_fast.tasks.values import is_missing, plain

TABLES = 2000
FORMATS = ("csv", "tsv", "jsonl", "parquet")
TEXTS = [
    "007", "1.70", "1e5", "-0", "1_000", "0x1F", "2024-05-01", "2024-05-01T10:00:00+02:00", "10:30", "true", "False",
    "NA", "n/a", "None", "null", "nan", "NaN", "inf", "<NA>", "#N/A", "a,b", "a;b", "a|b", "a\tb", 'say "hi"', '"', '""',
    '"all"', "two\nlines", "cr\rhere", "both\r\nends", "'", "\\", "\\n", "{text}", "[1, 2]", '{"a": 1}', " pad ", "é",
    "e\u0301", "ß", "日本", "😀", "\u200b", "\u2028", "\x85", "\xa0", "=1+1", "#", "sep=;", "a" * 300,
]  # fmt: skip
NAMES = [
    "text",
    "label",
    "a.b",
    "c[0]",
    "d:e",
    "f!",
    "g{h}",
    "i j",
    "prediction",
    "error",
    "scores",
    "é",
    "0",
    'q"q',
    "x,y",
]
ALPHABET = "abc ,;\t\"'\n\r0123.-é漢😀\\{}[]:|"


def text(draw: random.Random) -> str:
    if draw.random() < 0.7:
        return draw.choice(TEXTS)
    return "x" + "".join(draw.choice(ALPHABET) for _ in range(draw.randrange(12)))


def table_of_texts(draw: random.Random) -> list[dict[str, Any]]:
    """Rows of texts with holes; the first column has none, because a blank line is no row."""
    names = draw.sample(NAMES, draw.randint(1, 5))
    holes = [0.0, *(draw.choice([0, 0.2, 0.9]) for _ in names[1:])]
    return [
        {name: None if draw.random() < hole else text(draw) for name, hole in zip(names, holes, strict=True)}
        for _ in range(draw.randint(1, 8))
    ]


def table_of_values(draw: random.Random) -> list[dict[str, Any]]:
    """Rows with a type for each column; jsonl columns may hold several."""
    makers = [
        lambda: text(draw),
        lambda: draw.randint(-(2**40), 2**40),
        lambda: draw.choice([0.1, 1.5, -2.0, 1e300, float("nan"), float("inf"), 5e-324]),
        lambda: draw.random() < 0.5,
        lambda: [text(draw) for _ in range(draw.randrange(3))],
    ]
    columns = {name: draw.choice(makers) for name in draw.sample(NAMES, draw.randint(1, 5))}
    return [
        {name: None if draw.random() < 0.2 else make() for name, make in columns.items()}
        for _ in range(draw.randint(1, 8))
    ]


def write(rows: list[dict[str, Any]], path: Path, draw: random.Random) -> None:
    """As other programs write: pandas, Python's csv, pyarrow."""
    if path.suffix in (".csv", ".tsv"):
        buffer = io.StringIO(newline="")
        # "\r\n" is the end of line with which Python quotes both kinds of line breaks in a cell.
        writer = csv.DictWriter(
            buffer,
            list(rows[0]),
            delimiter="\t" if path.suffix == ".tsv" else draw.choice(",;\t|"),
            quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
            lineterminator="\r\n",
        )
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(buffer.getvalue().encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"])))
    elif path.suffix == ".jsonl":
        ascii_only = draw.random() < 0.5
        path.write_bytes("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode())
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return (one is None and other is None) or one == other or (one != one and other != other)


def answer(rows: list[dict[str, Any]], _: Any) -> list[dict[str, Any]]:
    return [{"prediction": f"p{i}"} if i % 3 else {"error": "no"} for i in range(len(rows))]


@pytest.mark.parametrize("part", range(4))
def test_random_tables_come_back(tmp_path: Path, part: int) -> None:
    draw = random.Random(part)
    for number in range(part, TABLES, 4):
        kind = draw.choice(FORMATS)
        of_texts = kind in ("csv", "tsv") or draw.random() < 0.5
        rows = (table_of_texts if of_texts else table_of_values)(draw)
        path = tmp_path / f"in.{kind}"
        write(rows, path, draw)
        # Without two columns nothing shows a separator other than a comma.
        given = {"delimiter": ","} if kind == "csv" and len(rows[0]) == 1 else {}
        if kind == "csv":
            given = {"delimiter": delimiter_of(path)}
        read = load_rows(str(path), **given)
        assert same(list(read), rows), (number, kind)
        output = tmp_path / f"out.{draw.choice(['csv', 'jsonl', 'parquet'])}"
        output.unlink(missing_ok=True)
        write_answers(read, in_chunks(answer, read, [None] * len(read), chunk=3), output)
        given = {"delimiter": ","} if output.suffix == ".csv" else {}
        back = [{name: row[name] for name in rows[0]} for row in load_rows(str(output), **given)]
        if output.suffix == ".parquet" and kind == "parquet":
            assert pq.read_table(output).select(list(rows[0])).schema.equals(read.table.schema), (number, kind)
            assert same(back, rows), (number, kind)
        elif output.suffix == ".csv":
            assert [[cell(v) for v in row.values()] for row in back] == [
                [cell(v) for v in row.values()] for row in rows
            ]
        elif output.suffix == ".jsonl" or of_texts:
            assert same(back, [plain(row) for row in rows]), (number, kind, output.suffix)
        names = answer_names(read)
        found = load_rows(str(output), **given)
        assert next(iter(found)).get(names["error"]) == "no" and len(found) == len(rows)


def delimiter_of(path: Path) -> str:
    """The separator that the writer of this test chose, from the header's end."""
    for encoding in ("utf-16", "utf-8-sig"):
        try:
            content = path.read_bytes().decode(encoding)
        except UnicodeError:
            continue
        for delimiter in ",;\t|":
            rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
            if len({len(row) for row in rows}) == 1 and set(rows[0]) <= set(NAMES):
                return delimiter
    return ","


def cell(value: Any) -> str:
    value = plain(value)
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else json.dumps(value, ensure_ascii=False)


def test_types_of_parquet_come_out(tmp_path: Path) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    table = pa.table(
        {
            "tiny": pa.array([1, None], pa.int8()),
            "big": pa.array([2**62, None], pa.int64()),
            "when": pa.array([datetime.datetime(2024, 5, 1, tzinfo=zone), None], pa.timestamp("ns", "+02:00")),
            "span": pa.array([datetime.timedelta(seconds=5), None], pa.duration("us")),
            "money": pa.array([None, None], pa.decimal128(9, 2)),
            "raw": pa.array([b"\xff", None]),
            "kind": pa.array(["x", None]).dictionary_encode(),
            "nested": pa.array([{"a": [1]}, None]),
            "prediction": pa.array(["mine", None]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    rows = load_rows(str(tmp_path / "in.parquet"))
    for suffix in ("parquet", "csv", "jsonl"):
        output = tmp_path / f"out.{suffix}"
        assert write_answers(rows, in_chunks(answer, rows, [None, None]), output) == (2, 1)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.select(table.column_names).equals(table)
    assert out.column("prediction_2").to_pylist() == [None, "p1"] and out.column("error").to_pylist() == ["no", None]
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert line["when"].startswith("2024-05-01T00:00:00") and line["raw"] == "/w==" and line["prediction"] == "mine"
    frame = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert frame["big"].tolist() == [str(2**62), ""] and frame["nested"][0] == '{"a": [1]}'
