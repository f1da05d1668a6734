"""KoboldAI's soft prompts: a zip archive with ``meta.json`` and the vectors, ``tensor.npy``. No pickle.

Its programs write float32, float16 or bfloat16, the last as ``V2``.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

from torch import Tensor

from .npy_files import parse_npy

META, TENSOR = "meta.json", "tensor.npy"
LIMITS = {META: 1 << 20, TENSOR: 1 << 28}
"""Bytes of each file when unpacked."""
DAMAGED = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError)
"""What Python raises for a damaged archive. RuntimeError: it needs a password, or a newer version."""
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Methods that Python unpacks no further than it is asked to."""


def names_in_archive(path: Path) -> list[str] | None:
    """The names of the files in a zip archive; None: it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except DAMAGED:
        return None


def read_kobold(path: Path) -> Tensor:
    """[P, D] float32.

    Raises:
        ValueError: a file in the archive is too large or damaged, or not what its name says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            meta, content = (_read(archive, name) for name in (META, TENSOR))
    except DAMAGED as error:
        raise ValueError(f"{path} must be a soft prompt of KoboldAI: {error}") from error
    try:
        described = isinstance(json.loads(meta), dict)
    except (ValueError, RecursionError):
        described = False
    if not described:
        raise ValueError(f"{path}: {META} must be a JSON object")
    return parse_npy(content, f"{path}: {TENSOR}")


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    if entry.file_size > LIMITS[name] or entry.compress_type not in BOUNDED:
        raise ValueError(
            f"{archive.filename}: {name} must be stored or deflated and have at most {LIMITS[name]} bytes, got "
            f"method {entry.compress_type} and {entry.file_size} bytes"
        )
    with archive.open(entry) as file:
        return file.read(LIMITS[name])
