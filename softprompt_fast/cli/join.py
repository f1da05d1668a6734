"""``join``: makes one prompt of several that stand one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console


def join(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of prompts, in the order in which a request shall read them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the joined prompt.")],
) -> None:
    """Makes one prompt of several, one after the other; made for documents that compress has trained together."""
    from ..distillation.joining import join_prompts

    join_prompts(folders, output)
    console.print(
        f"use it: softprompt-fast generate --prompt {output} --data ...", highlight=False, markup=False, soft_wrap=True
    )
