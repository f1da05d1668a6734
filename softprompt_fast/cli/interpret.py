"""``interpret``: looks at the vectors of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..base.extras import require
from ..base.locations import located
from ..base.progress import progress_bar
from .data import DataOptions
from .options import BatchSize, Device, Dtype, Figure, OptionalData, OptionalModel, PromptFolders, Report, with_options
from .output import console, draw_figure, write_report
from .prompts import Force, load_plain_prompts

if TYPE_CHECKING:
    from ..tasks.task import Task


@with_options("data_options_of", DataOptions)
def interpret(
    prompt: PromptFolders,
    data_options_of: Callable[..., DataOptions],
    data: OptionalData = None,
    model: OptionalModel = None,
    force: Force = False,
    ablate: Annotated[
        str | None,
        typer.Option(help="Prompt whose vectors are dropped one by one on --data, if the folder has several prompts."),
    ] = None,
    neighbours: Annotated[
        int, typer.Option("--neighbours", "-k", min=1, help="Number of nearest tokens to show for each vector.")
    ] = 5,
    output: Report = None,
    figure: Figure = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Shows a prompt's nearest tokens, norms and, on rows, the effect of each vector. This is not an explanation."""
    data_options = data_options_of()
    if figure is not None:
        require("train", "matplotlib", purpose="--figure")
    from ..analysis.figures import interpretation_figure
    from ..analysis.interpretation import interpret as interpret_prompts
    from ..analysis.tables import print_interpretation

    prompt = located(prompt)
    rows = data_options.read(data) if data is not None else []
    tuned, tokenizer, folders = load_plain_prompts(prompt, model, dtype, device, force=force)
    name = ablate or (next(iter(folders)) if len(folders) == 1 else None)
    task = _task_of(folders, name) if rows else None
    passes = 1 + len(tuned.prompts[name]) if rows and name is not None else 0
    with progress_bar(len(rows) * passes, console) as advance:
        interpretation = interpret_prompts(
            tuned,
            tokenizer,
            {n: tuned.prompts[n].detach() for n in tuned.prompts},
            k=neighbours,
            task=task,
            rows=rows,
            ablate=name,
            batch_size=batch_size,
            progress=advance,
        )
    print_interpretation(interpretation, Console())
    write_report(interpretation.to_json(), output)
    draw_figure(lambda: interpretation_figure(interpretation), figure)


def _task_of(folders: dict[str, Path], name: str | None) -> Task:
    from ..tasks.task import Task

    if name is None:
        raise ValueError(f"--ablate must name one of the {len(folders)} prompts: {', '.join(folders)}")
    if name not in folders:
        raise ValueError(f"--ablate must be one of {', '.join(folders)}, got {name!r}")
    return Task.load(folders[name])
