"""``similar``: ranks stored prompts as starting points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..base.extras import require
from ..base.locations import located
from ..base.progress import progress_bar
from .data import DataOptions, TaskOptions
from .options import (
    BatchSize,
    Device,
    Dtype,
    Figure,
    OptionalData,
    OptionalModel,
    PromptFolders,
    Report,
    with_options,
)
from .output import console, draw_figure, write_report
from .prompts import Force, folders_by_name, load_plain_prompts

if TYPE_CHECKING:
    from ..tasks.task import Task


@with_options("task_options", TaskOptions)
@with_options("data_options_of", DataOptions)
def similar(
    prompt: PromptFolders,
    data_options_of: Callable[..., DataOptions],
    task_options: Callable[..., TaskOptions],
    data: OptionalData = None,
    target: Annotated[
        Path | None, typer.Option(help="Folder of a prompt of the target task, such as one tuned for a few steps.")
    ] = None,
    model: OptionalModel = None,
    force: Force = False,
    output: Report = None,
    figure: Figure = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Ranks stored prompts as starting points for a task. The target's task.json or the options describe the task."""
    data_options = data_options_of()
    if figure is not None:
        require("train", "matplotlib", purpose="--figure")
    from ..analysis.figures import similarity_figure
    from ..analysis.tables import print_similar
    from ..analysis.transfer import similar as rank_prompts
    from ..prompts.peft_files import read_prompt
    from ..tasks.task import TASK_FILE, Task

    options = task_options()
    prompt = located(prompt)
    rows = data_options.read(data) if data is not None else []
    target = None if target is None else located(target)
    own = None if target is None else next(iter(folders_by_name(target).values()))
    task = None
    if own is not None and (own / TASK_FILE).is_file():
        task = Task.load(own)
    elif rows:
        task = options.task(rows)
    tuned, tokenizer, folders = load_plain_prompts(prompt, model, dtype, device, force=force)
    sources = {n: tuned.prompts[n].detach() for n in folders if own is None or folders[n].resolve() != own.resolve()}
    if task is not None:
        task.read_chat(tokenizer)
        _check_places(task, {name: folders[name] for name in sources})
    with progress_bar(len(rows) * (1 + len(sources)), console) as advance:
        ranking = rank_prompts(
            tuned,
            tokenizer,
            task,
            rows,
            sources,
            None if own is None else read_prompt(own)[0],
            batch_size=batch_size,
            progress=advance,
        )
    print_similar(ranking, Console())
    write_report([source.to_json() for source in ranking], output)
    draw_figure(lambda: similarity_figure(ranking), figure)


def _check_places(task: Task, folders: dict[str, Path]) -> None:
    """A prompt before BOS and one after it do not start from each other."""
    from ..tasks.task import TASK_FILE, Task

    for name, folder in folders.items():
        if (folder / TASK_FILE).is_file() and Task.load(folder).prompt_holds_bos != task.prompt_holds_bos:
            raise ValueError(f"--prompt must hold prompts on the target's side of BOS, got {name!r} on the other")
