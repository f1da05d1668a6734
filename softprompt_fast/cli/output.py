"""Where commands write: messages on the error stream, reports and figures in files."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    console.print(f"wrote {path}")


def draw_figure(draw: Callable[[], Any], path: Path | None) -> None:
    """Draws and saves, if a file is asked for."""
    from ..base.figures import save_figure

    if path is not None:
        console.print(f"drew {save_figure(draw(), path)}")
