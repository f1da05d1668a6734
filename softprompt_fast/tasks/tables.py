"""Reads rows of data from files, folders of files and the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .csv_tables import read_csv
from .decoding import check_contents, decode, read_bytes
from .json_tables import read_json, read_json_lines
from .rows import Origin, Rows, joined

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("softprompt_fast")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLITS = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of a folder that ``datasets`` has written with ``save_to_disk``."""


class TextForm(NamedTuple):
    """How a text file is read; see :func:`load_rows`."""

    delimiter: str | None
    encoding: str | None
    header: bool


def load_rows(
    source: str,
    split: str | None = None,
    *,
    config: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    header: bool = True,
) -> Rows:
    """Rows of a file, of a folder of files, or of a dataset on the hub.

    Args:
        source: a jsonl, ndjson, json, csv, tsv or parquet file, also compressed (.gz, .bz2, .xz); a folder of files of
            one of these kinds; a folder from ``save_to_disk``; or the name of a dataset on the hub.
        split: of a dataset on the hub ("train" by default), or of a folder with several.
        config: configuration of a dataset on the hub.
        delimiter: between the fields of a csv or tsv file. By default the file shows it.
        encoding: of a text file. By default the file shows it.
        header: the first row of a csv or tsv file names the columns. False: they are called 1, 2, 3 and so on.

    Returns:
        A list of dicts that also knows the file and line of each row.

    Raises:
        ValueError: an unknown kind of file, one that cannot be read as it is, or no rows.
        FileNotFoundError: no such file.
    """
    if source in ("", "-"):
        raise ValueError(f"the data must be a file, a folder or a dataset on the hub, got {source!r}")
    path = Path(source)
    form = TextForm(delimiter, encoding, header)
    if not path.exists():
        if kind_of(path) is not None or not HUB_NAME.fullmatch(source) or path.is_absolute():
            raise FileNotFoundError(f"no such file: {source}")
        rows = _from_hub(source, split or "train", config)
    elif config is not None:
        raise ValueError(f"`config` is for datasets on the hub, and {source} is a file or folder")
    elif path.is_dir():
        rows = _from_folder(path, split, form)
    elif split is not None:
        raise ValueError(f"`split` is for datasets on the hub, and {source} is a file")
    else:
        rows = _from_file(path, form)
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, in lower case; None for files of other kinds."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def from_arrow(table: pa.Table, name: str, classes: dict[str, list[str]] | None = None) -> Rows:
    """Rows of an Arrow table. Numbers of classes become the classes' names.

    Args:
        classes: names of the classes of each column that holds their numbers.
    """
    if double := sorted({column for column in table.column_names if table.column_names.count(column) > 1}):
        raise ValueError(f"{name} must name each column once, got {', '.join(map(repr, double))} more than once")
    rows = table.to_pylist()
    for column, names in (classes or {}).items():
        for row in rows:
            number = row[column]
            if isinstance(number, int):  # -1 is a row without a class
                row[column] = names[number] if 0 <= number < len(names) else None
    return Rows(rows, [Origin(name, "row", number) for number in range(1, len(rows) + 1)], table)


def _from_file(path: Path, form: TextForm) -> Rows:
    kind, name = kind_of(path), str(path)
    if kind is None:
        raise ValueError(
            f"{path} must be a {', '.join(SUFFIXES)} file ({', '.join(COMPRESSED)} too), a folder of them, or the name "
            "of a dataset on the hub"
        )
    data = read_bytes(path, name)
    if not form.header and kind not in (".csv", ".tsv"):
        raise ValueError(f"`header` (--no-header) is for csv and tsv files, got {path}")
    if kind == ".parquet":
        if not data.startswith(b"PAR1"):
            check_contents(data, name)
        return _from_parquet(data, name)
    check_contents(data, name)
    text = decode(data, name, form.encoding)
    if kind in (".csv", ".tsv"):
        rows, numbers = read_csv(text, name, tabs=kind == ".tsv", delimiter=form.delimiter, header=form.header)
        return Rows(rows, [Origin(name, "line", number) for number in numbers])
    in_lines = kind in (".jsonl", ".ndjson")
    rows, numbers = (read_json_lines if in_lines else read_json)(text, name)
    return Rows(rows, [Origin(name, "line" if in_lines else "row", number) for number in numbers])


def _from_parquet(data: bytes, name: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} could not be read: {error}") from error
    return from_arrow(table, name, _classes_of_metadata(table.schema.metadata or {}))


def _classes_of_metadata(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes of each column, as ``datasets`` writes them into a parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _from_folder(folder: Path, split: str | None, form: TextForm) -> Rows:
    """Rows of all files of a folder, in the order of their names."""
    if any((folder / name).is_file() for name in SAVED):
        return _saved_to_disk(folder, split)
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and kind_of(file) is not None and not file.name.startswith(".")  # of editors and systems
    )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = SPLITS.match(file.name)
        by_split.setdefault(match[1].lower() if match else "", []).append(file)
    if split is not None:
        if split not in by_split:
            raise ValueError(f"{folder} must hold files whose names begin with {split!r} (`split`), got none")
        files = by_split[split]
    elif len(by_split) > 1:
        raise ValueError(
            f"{folder} holds files of several splits ({', '.join(name or 'none' for name in by_split)}); give `split`, "
            "or one file"
        )
    if not files:
        raise ValueError(f"{folder} must hold {', '.join(SUFFIXES)} files, got none")
    if len(kinds := sorted({str(kind_of(file)) for file in files})) > 1:
        raise ValueError(f"{folder} must hold files of one kind, got {', '.join(kinds)}")
    parts = [_from_file(file, form) for file in files]
    return _joined([part for part in parts if part])


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several files with the same columns."""
    for part in parts[1:]:
        if set(part[0]) != set(parts[0][0]):
            raise ValueError(
                f"{part.origins[0].file} must have the columns of {parts[0].origins[0].file}, {list(parts[0][0])}, got "
                f"{list(part[0])}"
            )
    tables = [part.table for part in parts]
    table = None
    if tables and all(table is not None for table in tables):
        import pyarrow as pa

        table = pa.concat_tables(tables, promote_options="permissive")
    together = joined(*parts)
    return Rows(together, [origin for part in parts for origin in part.origins], table)


def _saved_to_disk(folder: Path, split: str | None) -> Rows:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # the library's errors have no common class
        raise ValueError(f"{folder} could not be read: {_first_line(error)}") from error
    if isinstance(data, DatasetDict):
        chosen = split or "train"
        if chosen not in data:
            raise ValueError(f"`split` must be one of {', '.join(data)}, got {chosen!r}")
        data = data[chosen]
    elif split is not None:
        raise ValueError(f"`split` is for folders with several splits, and {folder} holds one")
    return from_dataset(data, str(folder))


def _from_hub(name: str, split: str, config: str | None) -> Rows:
    from datasets import load_dataset

    quiet = logging.getLogger("huggingface_hub"), logging.getLogger("datasets")
    levels = [log.level for log in quiet]
    for log in quiet:
        log.setLevel(logging.ERROR)  # a line for each of a dozen attempts
    try:
        return from_dataset(load_dataset(name, config, split=split), name)
    except Exception as error:  # the library's errors have no common class
        raise ValueError(_why_not(name, split, error)) from error
    finally:
        for log, level in zip(quiet, levels, strict=True):
            log.setLevel(level)


def _why_not(name: str, split: str, error: Exception) -> str:
    text = str(error)
    if configs := re.search(r"available configs: \[(.*?)\]", text, re.DOTALL):
        return f"dataset {name!r} has several configurations; give `config` (--config), one of {configs[1]}"
    if isinstance(error, ConnectionError) or "onnect" in text or "offline" in text.lower():
        return f"there is no file {name!r}, and the hub could not be reached to look for a dataset of this name"
    return (
        f"there is no file {name!r}, and no dataset of this name could be read (split {split!r}): {_first_line(error)}"
    )


def from_dataset(data: Any, name: str) -> Rows:
    """Rows of a dataset of ``datasets``. Numbers of classes become the classes' names."""
    table = data.with_format("arrow")[:]
    names = {column: getattr(feature, "names", None) for column, feature in data.features.items()}
    return from_arrow(table, name, {column: found for column, found in names.items() if found})


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
