"""Pickles are recognised and never read: reading one can run any code that its author put into it."""

from __future__ import annotations

import shlex
from pathlib import Path

CODE = (
    "import sys, torch, safetensors.torch as s; "
    'x = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
    'x = x if isinstance(x, dict) else {"prompt_embeddings": x}; '
    "s.save_file({k: v.detach().contiguous() for k, v in x.items()}, sys.argv[2])"
)
"""Reads a pickle of tensors and refuses all others (``weights_only``); writes a safetensors file."""


def is_pickle(start: bytes, names: list[str] | None) -> bool:
    """Whether a file is a pickle.

    Args:
        start: its first bytes.
        names: of the files in it if it is a zip archive.
    """
    if names is not None:
        return any(Path(name).name == "data.pkl" for name in names)
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5


def conversion(path: Path) -> str:
    """The command that makes a safetensors file of a pickle of tensors."""
    return shlex.join(["python", "-c", CODE, str(path), str(path.with_suffix(".safetensors"))])


def refusal(path: Path) -> ValueError:
    return ValueError(
        f"{path} must be a safetensors file, got a pickle, which could run any code; convert it: {conversion(path)}"
    )
