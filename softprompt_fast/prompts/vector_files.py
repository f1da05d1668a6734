"""Vectors from any file or folder that holds one prompt. What a file is, its first bytes say, not its name."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import Tensor

from ..base.locations import located
from . import kobold_files, npy_files, pickle_files
from .peft_files import is_prompt_folder, read_prompt
from .tensor_files import is_safetensors, read_tensor

READ = "a prompt's folder, a .safetensors or .npy file with one tensor, or a soft prompt of KoboldAI"


def read_vectors(path: PathLike[str] | str) -> Tensor:
    """[P, D] float32 from an adapter folder, a version, or a file.

    A safetensors file has one tensor, or one named ``prompt_embeddings``.

    Raises:
        ValueError: the path is none of these; with what was found.
    """
    path = located(path)
    if is_prompt_folder(path) or path.is_dir():
        return read_prompt(path)[0]
    if not path.is_file():
        raise ValueError(
            "`init` must be random, vocabulary, text, class_labels, a tensor, or the path or version of a prompt "
            f"(in tuning also auto), got {str(path)!r}"
        )
    return read_file(path)


def read_file(path: Path) -> Tensor:
    """[P, D] float32 from a file; raises as :func:`read_vectors` does."""
    with path.open("rb") as file:
        start = file.read(16)
    names = kobold_files.names_in_archive(path) if start.startswith(b"PK") else None
    if is_safetensors(start):  # before pickles, because the length of its header can begin as they do
        return read_tensor(path)
    if pickle_files.is_pickle(start, names):
        raise pickle_files.refusal(path)
    if start.startswith(npy_files.MAGIC):
        return npy_files.read_npy(path)
    if names is not None and {kobold_files.META, kobold_files.TENSOR} <= set(names):
        return kobold_files.read_kobold(path)
    raise ValueError(f"{path} must be {READ}, got {_found(start, names)}")


def _found(start: bytes, names: list[str] | None) -> str:
    if names is not None:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"a zip archive with the files {[name[:40] for name in names[:4]]}{more}"
    return f"a file that begins with {start[:8]!r}" if start else "an empty file"
