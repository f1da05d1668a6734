"""``compare``: compares ways to use a model for a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..base.extras import require
from .data import DataOptions, TaskOptions
from .options import DATA, MACHINE, OUTPUT, PROMPT, TRAINING, Data, Device, Dtype, Figure, Model, with_options
from .output import console, draw_figure

if TYPE_CHECKING:
    from ..tasks.examples import Examples
    from ..tasks.task import Task

NEED_PEFT = {"peft-prompt", "lora"}
"""Methods that run in PEFT."""

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the results. Run the same command again to continue.")
]
Methods = Annotated[str | None, typer.Option(help="Methods to compare, separated by commas. By default all.")]
ValidationRows = Annotated[
    str | None,
    typer.Option(help="Rows that choose checkpoints. By default a part of --data.", rich_help_panel=DATA),
]
TestRows = Annotated[
    str | None,
    typer.Option(help="Rows that are scored once, at the end. By default a part of --data.", rich_help_panel=DATA),
]
ValidationShare = Annotated[
    float,
    typer.Option(help="Share (below 1) or number of rows of --data for validation.", rich_help_panel=DATA),
]
TestShare = Annotated[
    float, typer.Option(help="Share (below 1) or number of rows of --data for the test.", rich_help_panel=DATA)
]
CommonSplitSeed = Annotated[
    int,
    typer.Option(help="Seed that splits the data, the same for all methods and --seeds.", rich_help_panel=DATA),
]
MaxTrain = Annotated[
    int | None, typer.Option(min=1, help="Largest number of training rows, drawn at random.", rich_help_panel=DATA)
]
MaxValidation = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of validation rows, drawn at random.", rich_help_panel=DATA),
]
MaxTest = Annotated[
    int | None, typer.Option(min=1, help="Largest number of test rows, drawn at random.", rich_help_panel=DATA)
]
VirtualTokens = Annotated[
    int, typer.Option("--virtual-tokens", "-P", min=1, help="Length of the prompts.", rich_help_panel=PROMPT)
]
Instruction = Annotated[
    str | None,
    typer.Option(
        help=r"Text before each row, for instruction and few-shot; \n is a line break.", rich_help_panel=PROMPT
    ),
]
Seeds = Annotated[
    str,
    typer.Option(help="Seeds, separated by commas. Each trained method runs once per seed.", rich_help_panel=TRAINING),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps of every trained method.", rich_help_panel=TRAINING)]
RowsPerBatch = Annotated[
    int, typer.Option("--batch-size", "-b", min=1, help="Rows per batch.", rich_help_panel=TRAINING)
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Option of one method as METHOD.OPTION=VALUE, such as lora.learning_rate=1e-4. Repeat it for others.",
        rich_help_panel=TRAINING,
    ),
]
DataName = Annotated[
    str | None,
    typer.Option(help="Name of the data in the tables. By default the file's.", rich_help_panel=OUTPUT),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of jobs in parallel. Timings are less reliable with more than one.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads per job.", rich_help_panel=MACHINE)]
Timeout = Annotated[float | None, typer.Option(min=1.0, help="Minutes that one job may take.", rich_help_panel=MACHINE)]


@with_options("task_options", TaskOptions)
@with_options("data_options_of", DataOptions)
def compare(
    model: Model,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    task_options: Callable[..., TaskOptions],
    output: Output = Path("compare"),
    methods: Methods = None,
    validation: ValidationRows = None,
    test: TestRows = None,
    validation_share: ValidationShare = 0.1,
    test_share: TestShare = 0.2,
    split_seed: CommonSplitSeed = 0,
    max_train: MaxTrain = None,
    max_validation: MaxValidation = None,
    max_test: MaxTest = None,
    virtual_tokens: VirtualTokens = 20,
    instruction: Instruction = None,
    seeds: Seeds = "0",
    steps: Steps = 120,
    batch_size: RowsPerBatch = 32,
    settings: MethodSettings = None,
    figure: Figure = None,
    name: DataName = None,
    jobs: Jobs = 1,
    threads: Threads = None,
    timeout: Timeout = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Compares prompt tuning with zero-shot, instruction, few-shot, PEFT, LoRA, a linear probe and full fine-tuning."""
    names = _methods(methods)
    from ..comparison.drawing import overview_figure
    from ..comparison.run import compare as run
    from ..comparison.settings import METHODS, parse_options
    from ..comparison.tables import print_comparison

    options, data_options = task_options(), data_options_of()
    train, validation_rows, test_rows = _splits(
        rows := data_options.read(data),
        None if validation is None else data_options.read(validation),
        None if test is None else data_options.read(test),
        validation_share,
        test_share,
        split_seed,
    )
    task = _task(options, rows, model)
    try:
        comparison = run(
            model,
            task,
            _at_most(train, max_train, split_seed),
            _at_most(validation_rows, max_validation, split_seed),
            _at_most(test_rows, max_test, split_seed),
            output,
            methods=METHODS if names is None else names,
            seeds=_seeds(seeds),
            steps=steps,
            batch_size=batch_size,
            num_virtual_tokens=virtual_tokens,
            instruction=None if instruction is None else instruction.replace("\\n", "\n"),
            options=parse_options(settings or []),
            dtype=dtype,
            device=device,
            jobs=jobs,
            threads=threads,
            timeout=None if timeout is None else 60 * timeout,
            data_name=name or Path(data).stem,
            files={"data": data, "validation": validation, "test": test},
            split_seed=split_seed,
            console=console,
        )
    except KeyboardInterrupt:
        where = f"interrupted; run the same command to continue from what is finished in {output}"
        console.print(where, highlight=False, markup=False)
        raise typer.Exit(130) from None
    print_comparison(comparison, Console())
    console.print(f"wrote {output / 'report.html'}, results.json, results.csv", highlight=False, markup=False)
    draw_figure(lambda: overview_figure(comparison), figure)
    if all(summary.score is None for summary in comparison.summaries):
        raise typer.Exit(1)


def _task(options: TaskOptions, rows: Examples, model: str) -> Task:
    """The task on these rows, with the model's chat template if it reads conversations."""
    from ..hf.loading import load_tokenizer

    task = options.task(rows, model=model)
    if task.chat is not None:
        task.read_chat(load_tokenizer(model))
    return task


def _splits(
    rows: Examples,
    validation_rows: Examples | None,
    test_rows: Examples | None,
    validation_share: float,
    test_share: float,
    seed: int,
) -> tuple[Examples, Examples, Examples]:
    """Training, validation and test rows; the last two are given or taken from the rows."""
    from ..tasks.examples import split_rows

    train = rows
    if test_rows is None:
        train, test_rows = split_rows(train, test_share, seed)
    if validation_rows is None:
        # A share of all rows, whether or not test rows were taken from them.
        count = round(len(rows) * validation_share) if validation_share < 1 else int(validation_share)
        train, validation_rows = split_rows(train, max(1, count), seed + 1)
    return train, validation_rows, test_rows


def _methods(methods: str | None) -> list[str] | None:
    """The methods by name, None: all. Packages that they need must be installed."""
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    if names is None or NEED_PEFT & set(names):
        require("compare", "peft", purpose="compare")
    require("train", "accelerate", "datasets", "sklearn", "matplotlib", purpose="compare")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error


def _at_most(rows: Examples, most: int | None, seed: int) -> Examples:
    """All rows, or a part of them drawn at random."""
    from ..tasks.examples import split_rows

    if most is None or len(rows) <= most:
        return rows
    return split_rows(rows, most, seed)[1]
