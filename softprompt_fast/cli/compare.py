"""The command line's part that compares ways to use a model for a task: ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .analysis import (
    Kind,
    LabelColumn,
    LabelWords,
    MaxLength,
    Picture,
    PromptColumn,
    ResponseColumn,
    Template,
    TextColumn,
    _draw,
    task_of_options,
)
from .app import BatchSize, Data, Device, Dtype, Model, TaskKind, app, console


@app.command()
def compare(
    model: Model,
    data: Data,
    validation: Annotated[
        str | None, typer.Option(help="Rows that choose checkpoints; default: a part of the data.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Rows scored once, at the end; default: a part of the data.")] = None,
    validation_share: Annotated[float, typer.Option(help="Share (below 1) or number of rows.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Share (below 1) or number of rows.")] = 0.2,
    split_seed: Annotated[int, typer.Option(help="Of the split; the same for all methods and seeds.")] = 0,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; each trained method runs once per seed.")] = "0",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of every trained method.")] = 120,
    batch_size: BatchSize = 32,
    virtual_tokens: Annotated[int, typer.Option("--virtual-tokens", "-P", min=1)] = 20,
    instruction: Annotated[
        str | None, typer.Option(help=r"Text in front, for instruction and few-shot; \n is a line break.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.OPTION=VALUE, such as lora.learning_rate=1e-4.")
    ] = None,
    task: Kind = TaskKind.classification,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    template: Template = None,
    label_word: LabelWords = None,
    max_length: MaxLength = 512,
    max_train: Annotated[int | None, typer.Option(min=1, help="Use so many training rows, drawn at random.")] = None,
    max_validation: Annotated[int | None, typer.Option(min=1, help="The same for validation rows.")] = None,
    max_test: Annotated[int | None, typer.Option(min=1, help="The same for test rows.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results; run again to go on.")] = Path("compare"),
    figure: Picture = None,
    name: Annotated[str | None, typer.Option(help="What the data are called in the tables; default: the file.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once; more than one blur the times.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per process.")] = None,
    timeout: Annotated[float | None, typer.Option(min=1.0, help="Minutes that one job may take.")] = None,
    split: str = "train",
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Compares prompt tuning with zero-shot, instruction, few-shot, PEFT, LoRA, a linear probe and full fine-tuning."""
    from ..comparison.drawing import overview_figure
    from ..comparison.run import compare as run
    from ..comparison.settings import METHODS, parse_options
    from ..comparison.tables import print_comparison
    from ..tasks.examples import split_rows
    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    train = rows
    if test is not None:
        test_rows = load_rows(test, split)
    else:
        train, test_rows = split_rows(train, test_share, split_seed)
    if validation is not None:
        validation_rows = load_rows(validation, split)
    else:
        # Of all rows, whether or not test rows were taken from them.
        count = round(len(rows) * validation_share) if validation_share < 1 else int(validation_share)
        train, validation_rows = split_rows(train, max(1, count), split_seed + 1)
    chosen = task_of_options(
        rows, task, text_column, label_column, prompt_column, response_column, template, label_word
    )
    chosen.max_length, chosen.model = max_length, model
    if instruction is not None:
        instruction = instruction.replace("\\n", "\n")
    try:
        found = run(
            model,
            chosen,
            _at_most(train, max_train, split_seed),
            _at_most(validation_rows, max_validation, split_seed),
            _at_most(test_rows, max_test, split_seed),
            output,
            methods=METHODS if methods is None else [m.strip() for m in methods.split(",") if m.strip()],
            seeds=_seeds(seeds),
            steps=steps,
            batch_size=batch_size,
            num_virtual_tokens=virtual_tokens,
            instruction=instruction,
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
        console.print(f"interrupted; what is done is kept in {output}: the same command goes on", highlight=False)
        raise typer.Exit(130) from None
    print_comparison(found, Console())
    console.print(f"wrote {output / 'report.html'}, results.json, results.csv", highlight=False)
    _draw(lambda: overview_figure(found), figure)
    if all(summary.score is None for summary in found.summaries):
        raise typer.Exit(1)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error


def _at_most(rows: list[dict[str, Any]], most: int | None, seed: int) -> list[dict[str, Any]]:
    from ..tasks.examples import split_rows

    if most is None or len(rows) <= most:
        return rows
    return split_rows(rows, most, seed)[1]
