"""``prune``: shortens a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..base.extras import require
from ..base.locations import located
from .data import DataOptions, hold_out
from .options import (
    DATA,
    PROMPT,
    BatchSize,
    Device,
    Dtype,
    Figure,
    OptionalModel,
    PromptFolder,
    SplitSeed,
    with_options,
)
from .output import console, draw_figure
from .prompts import Force, load_plain_prompts

Data = Annotated[str, typer.Option("--data", "-d", help="Labelled rows that decide which vectors are removed.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the shorter prompt.")]
OtherRows = Annotated[
    str | None,
    typer.Option(help="Other rows, scored before and after. By default half of the data.", rich_help_panel=DATA),
]
MinTokens = Annotated[int, typer.Option(min=1, help="Smallest number of vectors to keep.", rich_help_panel=PROMPT)]
Tolerance = Annotated[
    float,
    typer.Option(min=0.0, help="Accepted loss above the lowest one that was seen.", rich_help_panel=PROMPT),
]
Rescore = Annotated[
    bool,
    typer.Option(help="Score all remaining vectors again after each removal. Slower.", rich_help_panel=PROMPT),
]
Pieces = Annotated[
    int,
    typer.Option(min=0, help="Pieces of each vector that may be set to zero as well; 0: none.", rich_help_panel=PROMPT),
]


@with_options("data_options_of", DataOptions)
def prune(
    prompt: PromptFolder,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    output: Output,
    model: OptionalModel = None,
    force: Force = False,
    validation: OtherRows = None,
    seed: SplitSeed = 0,
    min_tokens: MinTokens = 1,
    tolerance: Tolerance = 0.0,
    rescore: Rescore = False,
    pieces: Pieces = 0,
    figure: Figure = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Removes vectors of a prompt that do not help. Scores it on other rows before and after; nothing is retrained."""
    data_options = data_options_of()
    if figure is not None:
        require("train", "matplotlib", purpose="--figure")
    from ..analysis.figures import pruning_figure
    from ..analysis.pruning import prune as prune_prompt
    from ..analysis.tables import print_pruned
    from ..tasks.task import Task

    prompt = located(prompt)
    rows, other_rows = hold_out(data_options.read(data), validation, 0.5, data_options, seed)
    tuned, tokenizer, folders = load_plain_prompts(prompt, model, dtype, device, force=force)
    if len(folders) > 1:
        raise ValueError(f"--prompt must be the folder of one prompt, got {prompt} with {', '.join(folders)}")
    ((name, folder),) = folders.items()
    task = Task.load(folder)
    task.prompt = name
    if (output / name).exists():
        raise FileExistsError(f"{output / name} already exists; choose another --output")
    with console.status("scoring shortened prompts"):
        pruned = prune_prompt(
            tuned,
            tokenizer,
            task,
            tuned.prompts[name],
            rows,
            other_rows,
            min_tokens=min_tokens,
            tolerance=tolerance,
            rescore=rescore,
            pieces=pieces,
            batch_size=batch_size,
        )
    print_pruned(pruned, Console())
    console.print(f"saved in {pruned.save(tuned, task, output)}", markup=False)
    draw_figure(lambda: pruning_figure(pruned), figure)
