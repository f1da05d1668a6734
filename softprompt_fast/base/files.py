"""Writes files so that readers see a whole file or none."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a scratch file next to ``path`` and renames it. Makes the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def save_tensors_atomically(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Writes a safetensors file of contiguous tensors on the host. Equal contents give equal bytes."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    save_file(tensors, scratch, metadata=metadata)
    if len(metadata) > 1:
        _sort_metadata(scratch)
    scratch.replace(path)


def _sort_metadata(path: Path) -> None:
    """Sorts the entries of a safetensors file's metadata, which the library writes in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON atomically. NaN and infinity are not JSON, so they raise a ValueError."""
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds JSON objects to a file, a line each, in one write: lines of several processes do not mix.

    A line that a crash has torn before stays a line of its own. Makes the folder if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        file.write(("\n" if torn else "").encode() + text.encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None: there is no such file, or it is incomplete."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return values if isinstance(values, dict) else None


def check_folder(path: Path, argument: str) -> None:
    """Checks before any work that files can be written into a folder, which need not exist yet.

    Raises:
        OSError: naming the argument and the path.
    """
    place = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"{argument} must be a folder that can be written to, got {path}: {error.strerror or error} ({place})"
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
