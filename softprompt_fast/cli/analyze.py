"""``analyze``: looks at data before tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from ..base.extras import require
from ..base.progress import progress_bar
from .data import DataOptions, TaskOptions, hold_out
from .options import (
    DATA,
    BatchSize,
    Data,
    Device,
    Dtype,
    Figure,
    HeldOut,
    Model,
    Report,
    SplitSeed,
    Validation,
    with_options,
)
from .output import console, draw_figure, write_report


@with_options("task_options", TaskOptions)
@with_options("data_options_of", DataOptions)
def analyze(
    model: Model,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    task_options: Callable[..., TaskOptions],
    validation: Validation = None,
    held_out: HeldOut = 0.1,
    sample: Annotated[
        int,
        typer.Option(
            min=0, help="Held-out rows that the model without a prompt answers; 0 skips this.", rich_help_panel=DATA
        ),
    ] = 500,
    seed: SplitSeed = 0,
    output: Report = None,
    figure: Figure = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Looks at data before tuning: lengths, classes, repeated texts, leaks, baselines, and a recipe."""
    data_options = data_options_of()
    require("train", "accelerate", "datasets", "sklearn", purpose="analyze")
    if figure is not None:
        require("train", "matplotlib", purpose="--figure")
    from ..analysis.data_analysis import analyze as analyze_data
    from ..analysis.figures import analysis_figure
    from ..analysis.tables import print_analysis
    from ..hf.loading import load_base_model
    from ..models.soft_prompt_model import SoftPromptModel

    options = task_options()
    rows = data_options.read(data)
    task = options.task(rows)
    rows, held_out_rows = hold_out(rows, validation, held_out, data_options, seed)
    base, tokenizer = load_base_model(model, dtype, device, console=console)
    task.read_chat(tokenizer)
    with progress_bar(min(sample, len(held_out_rows)), console) as advance:
        analysis = analyze_data(
            SoftPromptModel(base),
            tokenizer,
            task,
            rows,
            held_out_rows,
            sample=sample,
            batch_size=batch_size,
            seed=seed,
            progress=advance,
        )
    print_analysis(analysis, Console())
    write_report(analysis.to_json(), output)
    draw_figure(lambda: analysis_figure(analysis), figure)
