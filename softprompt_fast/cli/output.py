"""Where commands write: messages on the error stream, reports and figures in files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(stderr=True)
EXIT_STATUS = "exit_status"
"""Attribute of an exception: the status with which it ends the process, 1 if it has none."""


def write_report(values: Any, path: Path | None) -> None:
    """Writes JSON, if a file is asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    console.print(f"wrote {path}", markup=False)


def draw_figure(draw: Callable[[], Any], path: Path | None) -> None:
    """Draws and saves, if a file is asked for."""
    from ..base.figures import save_figure

    if path is not None:
        console.print(f"drew {save_figure(draw(), path)}", markup=False)


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, folders: Sequence[Path] = ()) -> None:
    """Checks before any work that files can be written, and that none is another file of the command.

    Args:
        folders: folders that files will be written to.

    Raises:
        OSError, ValueError: naming the path.
    """
    resolved = [path.resolve() for path in (*outputs, *inputs)]
    for path in outputs:
        if resolved.count(path.resolve()) > 1:
            raise ValueError(f"each output must be a file of its own, got {path} twice")
        if path.is_dir():
            raise IsADirectoryError(f"an output must be a file, got the folder {path}")
    for folder in dict.fromkeys([*(path.parent for path in outputs), *folders]):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"{folder} must be a folder that can be written to: {error.strerror or error}") from error
