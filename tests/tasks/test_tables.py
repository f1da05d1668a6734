"""Files as people have them: the bytes, the call, and the rows that are read or the message that says why not."""

# ruff: noqa: E501, RUF001 (a line for each case; texts in several alphabets)

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softprompt_fast.tasks.examples import digest, split_rows
from softprompt_fast.tasks.rows import place, places
from softprompt_fast.tasks.tables import load_rows

TWO = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]


def written(frame: dict[str, list[Any]], **options: Any) -> bytes:
    """A frame as pandas writes it."""
    return pd.DataFrame(frame).to_csv(index=False, **options).encode()  # type: ignore[no-any-return]


def texts(*values: Any) -> list[dict[str, Any]]:
    return [{"text": value} for value in values]


QUOTED = {"text": ["plain", 'He said "hi" to me', "two\nlines", "a\ttab", "a, b"], "label": ["a", "b", "b", "c", "d"]}
LATE = "text,label,note\n" + "".join(f"film {i},{i % 2},{'late' if i == 10045 else ''}\n" for i in range(10050))
READ: dict[str, tuple[str, bytes | str, dict[str, Any], list[dict[str, Any]]]] = {
    # every cell of a csv is its text
    "numbers": ("a.csv", "p,r\n007,1.70\n008,1e5\n", {}, [{"p": "007", "r": "1.70"}, {"p": "008", "r": "1e5"}]),
    "dates": ("a.csv", "text\n2024-05-01\n2024-05-01T10:00:00+02:00\n", {}, texts("2024-05-01", "2024-05-01T10:00:00+02:00")),
    "words": ("a.csv", "text\nNA\nNone\nnull\nn/a\nnan\ntrue\n", {}, texts("NA", "None", "null", "n/a", "nan", "true")),
    "hole": ("a.csv", "text,label\nx,\n,y\n", {}, [{"text": "x", "label": None}, {"text": None, "label": "y"}]),
    "blanks": ("a.csv", "text,label\n x , y\n", {}, [{"text": " x ", "label": " y"}]),
    # its shape
    "blank lines": ("a.csv", "text,label\na,b\n\nc,d\n\n", {}, TWO),
    "trailing separators": ("a.csv", "text,label,\na,b,\nc,d,\n", {}, TWO),
    "trailing separators of rows": ("a.csv", "text,label\na,b,,\nc,d\n", {}, TWO),
    "pandas' index": ("a.csv", ",text\n0,a\n", {}, [{"": "0", "text": "a"}]),
    "no last line break": ("a.csv", "text,label\na,b\nc,d", {}, TWO),
    "windows": ("a.csv", "text,label\r\na,b\r\nc,d\r\n", {}, TWO),
    "old mac": ("a.csv", "text,label\ra,b\rc,d\r", {}, TWO),
    "quotes": ("a.csv", 'text,label\n"a, ""b""\nc",x\n', {}, [{"text": 'a, "b"\nc', "label": "x"}]),
    "quote within": ("a.csv", 'text,label\n5" disk,x\n', {}, [{"text": '5" disk', "label": "x"}]),
    "long cell": ("a.csv", "text\n" + "x" * 200_000 + "\n", {}, texts("x" * 200_000)),
    # separators
    "semicolons": ("a.csv", "text;label\n1,5;b\nc;d, e\n", {}, [{"text": "1,5", "label": "b"}, {"text": "c", "label": "d, e"}]),
    "tabs": ("a.csv", "text\tlabel\na\tb\nc\td\n", {}, TWO),
    "pipes": ("a.csv", "text|label\na|b\nc|d\n", {}, TWO),
    "sep": ("a.csv", "sep=;\r\ntext;label\r\na;b\r\nc;d\r\n", {}, TWO),
    "sep of commas": ("a.csv", "sep=,\ntext,label\na,b\nc,d\n", {}, TWO),
    "given": ("a.csv", "text~label\na~b\nc~d\n", {"delimiter": "~"}, TWO),
    "one column": ("a.csv", "text\na; b\nc\n", {}, texts("a; b", "c")),
    # without a header
    "no header": ("a.csv", "a film,pos\nb,neg\n", {"header": False}, [{"1": "a film", "2": "pos"}, {"1": "b", "2": "neg"}]),
    "no header, a hole": ("a.csv", "a,\nb,neg\n", {"header": False}, [{"1": "a", "2": None}, {"1": "b", "2": "neg"}]),
    "no header, one row": ("a.tsv", "a\ta\n", {"header": False}, [{"1": "a", "2": "a"}]),
    # encodings
    "mark": ("a.csv", "\ufefftext;label\r\né;2,5\r\n", {}, [{"text": "é", "label": "2,5"}]),
    "utf-16": ("a.csv", "text,label\na,b\nc,d\n".encode("utf-16"), {}, TWO),
    "utf-16 without mark": ("a.csv", "text,label\na,b\nc,d\n".encode("utf-16-le"), {}, TWO),
    "latin-1": ("a.csv", "text\nun été «là»\n".encode("latin-1"), {}, texts("un été «là»")),
    "windows-1252": ("a.jsonl", '{"text": "it’s 5 € – très cher"}\n'.encode("cp1252"), {}, texts("it’s 5 € – très cher")),
    "given encoding": ("a.csv", "text\nда\n".encode("cp1251"), {"encoding": "cp1251"}, texts("да")),
    # tab-separated, with quotes that are marks or text
    "tsv of pandas": ("a.tsv", written(QUOTED, sep="\t"), {}, pd.DataFrame(QUOTED).to_dict("records")),
    "tsv all quoted": ("a.tsv", written(QUOTED, sep="\t", quoting=1), {}, pd.DataFrame(QUOTED).to_dict("records")),
    "tsv of a spreadsheet": ("a.tsv", 'text\tlabel\n"a, b"\tx\nc d\ty\n', {}, [{"text": "a, b", "label": "x"}, {"text": "c d", "label": "y"}]),
    "tsv plain": ("a.tsv", 'text\tlabel\n"Alien" is good\tx\nsaid "so\ty\n', {}, [{"text": '"Alien" is good', "label": "x"}, {"text": 'said "so', "label": "y"}]),
    "tsv with titles": ("a.tsv", 'text\tlabel\n"Alien"\tx\na "b" c\ty\n', {}, [{"text": '"Alien"', "label": "x"}, {"text": 'a "b" c', "label": "y"}]),
    # compressed, other suffixes
    "gz": ("a.csv.gz", gzip.compress(b"text,label\na,b\nc,d\n"), {}, TWO),
    "gz under another name": ("a.jsonl", gzip.compress(b'{"text": "a"}\n'), {}, texts("a")),
    "gz twice": ("a.csv.gz", gzip.compress(gzip.compress(b"text,label\na,b\nc,d\n")), {}, TWO),
    "ndjson": ("a.ndjson", '{"text": "a"}\n', {}, texts("a")),
    "upper case": ("A.JSONL", '{"text": "a"}\n', {}, texts("a")),
    "glob signs": ("a[1]*.csv", "text\na\n", {}, texts("a")),
    # JSON keeps its types, and dates are text
    "jsonl dates": ("a.jsonl", '{"d": "2024-05-01"}\n{"d": "2024-05-01T10:00:00+02:00"}\n', {}, [{"d": "2024-05-01"}, {"d": "2024-05-01T10:00:00+02:00"}]),
    "jsonl types": ("a.jsonl", '{"text": 1.5}\n{"text": "x"}\n{"text": true}\n{"text": null}\n', {}, texts(1.5, "x", True, None)),
    "jsonl old mac": ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r', {}, texts("a", "b")),
    "jsonl beyond floats": ("a.jsonl", '{"text": 9007199254740993}\n', {}, texts(9007199254740993)),
    "jsonl columns": ("a.jsonl", '{"a": 1}\n{"b": 2}\n', {}, [{"a": 1, "b": None}, {"a": None, "b": 2}]),
    "jsonl commas": ("a.jsonl", '{"text": "a"},\n{"text": "b"}\n', {}, texts("a", "b")),
    "jsonl surrogate": ("a.jsonl", '{"text": "a"}\n{"text": "bad \\ud83d end"}\n', {}, texts("a", "bad \ud83d end")),
    "jsonl separators": ("a.jsonl", '{"text": "a\u2028b\x85"}\n', {}, texts("a\u2028b\x85")),
    "json list": ("a.json", '[{"text": "a"}, {"text": "b"}]', {}, texts("a", "b")),
    "json list as jsonl": ("a.jsonl", '[{"text": "a"},\n {"text": "b"}]', {}, texts("a", "b")),
    "json under a key": ("a.json", '{"version": "1", "data": [{"text": "a"}]}', {}, texts("a")),
    "json columns": ("a.json", '{"text": ["a", "b"]}', {}, texts("a", "b")),
    "json of pandas": ("a.json", pd.DataFrame(texts("a", "b")).to_json(), {}, texts("a", "b")),
    "json rows of pandas": ("a.json", pd.DataFrame(texts("a", "b")).to_json(orient="index"), {}, texts("a", "b")),
    "json split of pandas": ("a.json", pd.DataFrame(texts("a", "b")).to_json(orient="split"), {}, texts("a", "b")),
    "json lines": ("a.json", '{"text": "a"}\n{"text": "b"}\n', {}, texts("a", "b")),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_files_that_are_read(tmp_path: Path, case: str) -> None:
    name, data, options, rows = READ[case]
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert list(load_rows(str(path), **options)) == rows


REFUSED: dict[str, tuple[str, bytes | str, dict[str, Any], str]] = {
    "comma in a text": ("a.csv", "text,label\nFilm, but bad,pos\nok,pos\n", {}, r"1 of 2 rows .* line 2 has 3"),
    "comma in every text": ("a.csv", "text,label\nFilm, but bad,pos\nNo, but,neg\n", {}, r"2 of 2 .* line 2 has 3, line 3 has 3"),
    "comma in one column": ("a.csv", "text\nGreat film, loved it\nDull\n", {}, r"line 2 has 2"),
    "short row": ("a.csv", "text,label\na,b\nc\n", {}, r"line 3 has 1; .*--delimiter"),
    "after a line break": ("a.csv", 'text,label\n"a\nb",x\nc\n', {}, r"line 4 has 1"),
    "torn quote": ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', {}, r"line 3: the quotes of a field are torn"),
    "quote and more": ("a.csv", 'text,label\n"a" b,c\n', {}, r"line 2: the quotes of a field are torn"),
    "backslash quotes": ("a.csv", 'text,label\n"a \\"b\\" c",d\n', {}, r"line 2: the quotes .* doubled"),
    "duplicate names": ("a.csv", "text,text\na,b\n", {}, r"line 1: .* 'text' more than once"),
    "several without a name": ("a.csv", "text,,,label\na,b,c,d\n", {}, r"'' more than once"),
    "no header, short row": ("a.csv", "a,b\nc\n", {"header": False}, r"1 of 2 rows do not have the 2 fields of the first row, .* line 2 has 1"),
    "no header of jsonl": ("a.jsonl", '{"a": 1}\n', {"header": False}, r"`header` \(--no-header\) is for csv and tsv files"),
    "no header asked for": ("a.csv", "good,good\nbad,good\n", {}, r"'good' more than once; .*--no-header"),
    "delimiter of two": ("a.csv", "a||b\n", {"delimiter": "||"}, "must be one character, .* got '||'"),
    "delimiter of quotes": ("a.csv", 'a"b\n', {"delimiter": '"'}, "not a quote or a line break"),
    "named rows": ("a.json", '{"x": {"text": "a"}, "y": {"text": "b"}}', {}, r"can be read by rows or by columns \('x', 'y', ...\)"),
    "empty object": ("a.json", "{}", {}, "a.json holds no rows"),
    "endless number": ("a.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}\n", {}, r"a.jsonl, line 2: a number with too many digits"),
    "archive": ("a.csv", b"PK\x03\x04" + bytes(40), {}, "is a zip archive or a spreadsheet"),
    "parquet as csv": ("a.csv", b"PAR1" + bytes(40), {}, "is a parquet file"),
    "web page": ("a.csv", "\n<!DOCTYPE html>\n<html></html>\n", {}, "is a web page"),
    "pointer": ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", {}, "is a pointer of Git LFS"),
    "header alone": ("a.csv", "text,label\n", {}, "holds no rows after its header"),
    "empty csv": ("a.csv", "", {}, "a.csv holds no rows"),
    "empty jsonl": ("a.jsonl", "", {}, "a.jsonl holds no rows"),
    "empty json": ("a.json", " ", {}, "a.json holds no rows"),
    "empty list": ("a.json", "[]", {}, "a.json holds no rows"),
    "two separators": ("a.csv", "a;b,c\nd;e,f\n", {}, "give `delimiter`"),
    "cyrillic": ("a.csv", "text\nда, нет\n".encode("cp1251"), {}, r"line 2: not UTF-8 .*--encoding"),
    "damaged utf-8": ("a.csv", b"text\n\xc3\xa9t\xc3\xa9\nb\xe9\n", {}, r"line 3: not UTF-8 \(byte 0xe9\)"),
    "wrong encoding": ("a.csv", b"text\nb\xe9\n", {"encoding": "utf-8"}, r"line 2: not utf-8"),
    "unknown encoding": ("a.csv", "text\na\n", {"encoding": "utf-99"}, "`encoding` must be"),
    "long separator": ("a.csv", "text\na\n", {"delimiter": "::"}, "`delimiter` must be one character"),
    "jsonl line": ("a.jsonl", '{"text": "a"}\n{"text": b}\n', {}, "a.jsonl, line 2: not JSON"),
    "jsonl of lists": ("a.jsonl", '{"text": "a"}\n["b"]\n', {}, "line 2: a row must be an object with columns, got list"),
    "jsonl column twice": ("a.jsonl", '{"text": "a", "text": "b"}\n', {}, "line 1: .* 'text' twice"),
    "json of several lists": ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', {}, "an object with 'train', 'test'"),
    "json columns of other lengths": ("a.json", '{"text": ["a", "b"], "label": [1]}', {}, "'text': 2, 'label': 1"),
    "json text": ("a.json", '"a"', {}, "must hold a list of rows, got str"),
    "parquet": ("a.parquet", "no parquet", {}, "a.parquet could not be read"),
    "torn gz": ("a.csv.gz", gzip.compress(b"text\na\n")[:-6], {}, "could not be unpacked"),
    "kind": ("a.xlsx", "x", {}, "must be a .jsonl, .ndjson"),
    "split of a file": ("a.csv", "text\na\n", {"split": "test"}, "`split` is for datasets on the hub"),
    "configuration of a file": ("a.csv", "text\na\n", {"config": "x"}, "`config` is for datasets on the hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(tmp_path: Path, case: str) -> None:
    name, data, options, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=message):
        load_rows(str(path), **options)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("film 0,pos\nfilm 1,neg\nfilm 2,pos\n", "pos"),
        ("text,3\na,1\nb,2\n", "3"),
        ("A film that nobody in this town should ever see,x\nb,y\n", "A film that nobody in this town should ever see"),
    ],
)
def test_a_first_row_that_looks_like_data_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: str, value: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(data)
    load_rows(str(path))
    assert f"{path}, line 1 names the columns, but looks like data ({value!r}); if the file has no" in caplog.text


@pytest.mark.parametrize("data", ["text,label\na,1\nb,2\n", "0,1,2\n3,4,5\n", "1,2\na,b\n", ",text\n0,a\n"])
def test_a_header_does_not_look_like_data(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(data)
    load_rows(str(path))
    assert not caplog.text


def test_a_late_note_changes_no_other_cell(tmp_path: Path) -> None:
    (tmp_path / "late.csv").write_text(LATE)
    rows = load_rows(str(tmp_path / "late.csv"))
    assert len(rows) == 10050 and [row["note"] for row in rows if row["note"]] == ["late"]
    assert {row["label"] for row in rows} == {"0", "1"}


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",a\n\nb,c\nd,e\nf,g\n')
    rows = load_rows(str(path))
    assert [place(rows, i) for i in range(4)] == [f"{path}, line {n}" for n in (2, 5, 6, 7)]
    train, held = split_rows(rows, 2, seed=0)
    assert {place(held, i) for i in range(2)} | {place(train, i) for i in range(2)} == {
        place(rows, i) for i in range(4)
    }
    assert places(rows, [2, 0]) == f"{path}, lines 2, 6" and places(list(rows), [1]) == "row 1"
    assert [place(rows[1:3], i) for i in range(2)] == [f"{path}, line {n}" for n in (5, 6)]
    assert digest(rows) == digest(list(rows))


def test_the_contents_decide_not_the_time_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for lines in (1, 2):
        path.write_text('{"text": "x"}\n' * lines)
        os.utime(path, (0, 0))
        assert len(load_rows(str(path))) == lines


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": pa.array([1, None], pa.int8()),
            "when": pa.array([0, None], pa.timestamp("us", "Europe/Berlin")),
            "raw": pa.array([b"a", None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert rows[0]["n"] == 1 and rows[0]["when"].utcoffset() is not None and rows[0]["raw"] == b"a"
    assert rows[1] == {"n": None, "when": None, "raw": None} and place(rows, 1).endswith("a.parquet, row 2")


def test_classes_have_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "several")
    for source in ("a.parquet", "one", "several"):
        assert [row["label"] for row in load_rows(str(tmp_path / source))] == ["positive", "negative", None]
    assert list(load_rows(str(tmp_path / "several"), "test")) == [{"text": "b", "label": "negative"}]
    with pytest.raises(ValueError, match=r"`split` must be one of train, test, got 'x'"):
        load_rows(str(tmp_path / "several"), "x")


def test_a_folder_of_files(tmp_path: Path) -> None:
    for number in (1, 0):
        (tmp_path / f"part-{number}.jsonl").write_text(f'{{"text": "{number}"}}\n')
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "._part-0.jsonl").write_bytes(b"\x00\x05\x16\x07")  # macOS writes such files beside others
    rows = load_rows(str(tmp_path))
    assert list(rows) == texts("0", "1") and place(rows, 1) == f"{tmp_path / 'part-1.jsonl'}, line 1"
    (tmp_path / "test-0.jsonl").write_text('{"text": "t"}\n')
    with pytest.raises(ValueError, match="several splits"):
        load_rows(str(tmp_path))
    assert list(load_rows(str(tmp_path), "test")) == texts("t")
    (tmp_path / "part-2.jsonl").write_text('{"other": "t"}\n')
    (tmp_path / "test-0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"part-2.jsonl must have the columns of .*part-0.jsonl"):
        load_rows(str(tmp_path))
    (tmp_path / "part-2.jsonl").rename(tmp_path / "part-2.csv")
    with pytest.raises(ValueError, match=r"files of one kind, got \.csv, \.jsonl"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['ax', 'cola']\nExample"),
            r"several configurations; give `config` \(--config\), one of 'ax', 'cola'",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "Dataset scripts are no longer"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub could not be reached"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match=message) as raised:
        load_rows("owner/name")
    assert "\n" not in str(raised.value)


def test_a_dataset_takes_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(load_rows("owner/name", "test", config="cola")) == texts("a")
    load_rows("owner/name")
    assert asked == [(("owner/name", "cola"), {"split": "test"}), (("owner/name", None), {"split": "train"})]


@pytest.mark.parametrize("name", ["missing.csv", "data/*.jsonl", "/nowhere/x", "missing.JSONL.gz"])
def test_a_path_that_is_no_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        load_rows(name)


@pytest.mark.parametrize("name", ["", "-"])
def test_a_source_that_names_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="must be a file, a folder or a dataset"):
        load_rows(name)


def test_a_frame_of_pandas_with_a_hole(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pd.DataFrame({"text": ["a", "b"], "label": [1, None]}).to_parquet(buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert rows[0] == {"text": "a", "label": 1.0} and pd.isna(rows[1]["label"])
