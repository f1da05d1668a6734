"""Reads rows of data from files and from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .examples import Examples

READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}


def load_rows(source: str, split: str = "train") -> Examples:
    """Rows of a jsonl, json, csv, tsv or parquet file, or of a dataset on the hub.

    Raises:
        ValueError: an unknown kind of file, one that cannot be read, or no rows.
        FileNotFoundError: no file of a name that ends like one.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    if path.suffix in READERS:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        builder, options = READERS[path.suffix]
        try:
            with _without_bars():
                data = load_dataset(builder, data_files=str(path), split="train", **options)
        except DatasetsError as error:
            raise ValueError(f"{source} could not be read: {error.__cause__ or error}") from error
    elif path.exists():
        raise ValueError(f"{source} must be a {', '.join(READERS)} file or the name of a dataset on the hub")
    else:
        data = load_dataset(source, split=split)
    rows = [dict(row) for row in data]
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides the bars of datasets, which say nothing useful about a local file."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
