"""``search``: finds a prompt length and a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..tuning.settings import TuningSettings
from .data import DataOptions, TaskOptions, hold_out
from .options import (
    DATA,
    Data,
    Deep,
    Device,
    Dtype,
    HeldOut,
    Model,
    PromptName,
    Register,
    Validation,
    with_options,
)
from .output import console
from .versions import prepare_register, register_prompts

if TYPE_CHECKING:
    from ..length_search.study import LogRange

SEARCH = "Search"
NOT_SEARCHED = (
    "num_virtual_tokens",
    "steps",
    "epochs",
    "eval_every",
    "patience",
    "token_update_rank",
    "token_update_learning_rate",
    "head_learning_rate",
)
"""Settings that a search decides itself, or has no use for."""

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the search and its prompt.")]
Resume = Annotated[bool, typer.Option(help="Continue the search in --output.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths to try, separated by commas.", rich_help_panel=SEARCH)]
LearningRates = Annotated[
    str | None,
    typer.Option(
        help="Learning rates to try with every length: 1e-3,1e-2, or LOW:HIGH or LOW:HIGH:DRAWS to draw from a "
        "range. By default --learning-rate.",
        rich_help_panel=SEARCH,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps of one full run.", rich_help_panel=SEARCH)]
Budget = Annotated[float, typer.Option(help="Cost of the whole search, in full runs.", rich_help_panel=SEARCH)]
TestRows = Annotated[
    str | None,
    typer.Option(help="Rows that are scored at the end and choose nothing.", rich_help_panel=DATA),
]


@with_options("task_options", TaskOptions)
@with_options("settings_of", TuningSettings, without=NOT_SEARCHED)
@with_options("data_options_of", DataOptions)
def search(
    model: Model,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    task_options: Callable[..., TaskOptions],
    settings_of: Callable[..., TuningSettings],
    output: Output = Path("search"),
    resume: Resume = False,
    lengths: Lengths = "1,2,5,10,20,50,100",
    learning_rates: LearningRates = None,
    steps: Steps = 120,
    budget: Budget = 2.0,
    validation: Validation = None,
    held_out: HeldOut = 0.1,
    test: TestRows = None,
    name: PromptName = "prompt",
    deep: Deep = False,
    register: Register = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Finds the shortest prompt that is not significantly worse than the best, for the cost of two runs."""
    data_options = data_options_of()
    require("search", "optuna", purpose="a search")
    require("train", "accelerate", "datasets", "sklearn", "matplotlib", purpose="a search")
    settings = prepare_register(register, settings_of(steps=steps))
    tried, rates = _numbers(lengths, int, "--lengths"), _rates(learning_rates)
    from ..hf.loading import load_base_model
    from ..length_search.run import search as search_lengths
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import complete_rows

    options = task_options()
    rows = data_options.read(data)
    task = options.task(rows, model=model, prompt=name)
    rows = complete_rows(task, rows)
    rows, held_out_rows = hold_out(rows, validation, held_out, data_options, settings.seed)
    test_rows = [] if test is None else data_options.read(test)
    base, tokenizer = load_base_model(model, dtype, device, console=console)
    task.read_chat(tokenizer)
    try:
        search_lengths(
            (DeepPromptModel if deep else SoftPromptModel)(base),
            tokenizer,
            task,
            rows,
            held_out_rows,
            output,
            settings,
            lengths=tried,
            learning_rates=rates,
            budget=budget,
            test_rows=test_rows,
            resume=resume,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("interrupted; run the same command with --resume to continue")
        raise typer.Exit(130) from None
    register_prompts(register, [output / name])
    console.print(
        f"use it: softprompt-fast predict --prompt {output / name} --data ...",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _rates(text: str | None) -> list[float] | LogRange | None:
    from ..length_search.study import LogRange

    if text is None:
        return None
    if ":" not in text:
        return _numbers(text, float, "--learning-rates")
    parts = text.split(":")
    try:
        return LogRange(float(parts[0]), float(parts[1]), *map(int, parts[2:]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--learning-rates must be like 1e-3,1e-2 or LOW:HIGH[:DRAWS] with LOW below HIGH, got {text!r}"
        ) from error


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from error
