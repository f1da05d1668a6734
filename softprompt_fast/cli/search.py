"""The command line's ``search``: which prompt length, and which learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .analysis import (
    Kind,
    LabelColumn,
    LabelWords,
    MaxLength,
    PromptColumn,
    ResponseColumn,
    Template,
    TextColumn,
    task_of_options,
)
from .app import BatchSize, Data, Device, Dtype, Model, TaskKind, app, console


@app.command()
def search(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the search and its prompt go.")] = Path(
        "search"
    ),
    lengths: Annotated[str, typer.Option(help="Prompt lengths to try, with commas.")] = "1,2,5,10,20,50,100",
    learning_rates: Annotated[
        str | None,
        typer.Option(help="To try with every length: 1e-3,1e-2, or LOW:HIGH[:DRAWS] to draw from. Default: --lr."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of one full run.")] = 120,
    budget: Annotated[float, typer.Option(help="What the search may cost, in full runs.")] = 2.0,
    task: Kind = TaskKind.classification,
    name: Annotated[str, typer.Option(help="The prompt's name.")] = "prompt",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    template: Template = None,
    label_word: LabelWords = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows that choose; default: a part.")] = None,
    held_out: Annotated[float, typer.Option(help="Share (below 1) or number of rows held out.")] = 0.1,
    test: Annotated[str | None, typer.Option(help="Rows that choose nothing, scored at the end.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    deep: Annotated[bool, typer.Option(help="Tune keys and values of every layer (prefix tuning).")] = False,
    init: Annotated[str, typer.Option(help="auto, random, vocabulary, text or class_labels.")] = "auto",
    init_text: Annotated[str | None, typer.Option(help="Text whose tokens start the prompt (--init text).")] = None,
    placement: Annotated[str, typer.Option(help="before_bos or after_bos.")] = "before_bos",
    objective: Annotated[str, typer.Option(help="Cross entropy among labels, or among the vocabulary.")] = "labels",
    optimizer: Annotated[str, typer.Option(help="adamw or adafactor.")] = "adamw",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 3e-2,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant; anew in every rung.")] = "cosine",
    batch_size: BatchSize = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    best_by: Annotated[str, typer.Option(help="Candidates rank by the lowest loss, or the highest accuracy.")] = "loss",
    reparameterization: Annotated[str, typer.Option(help="none, residual or low-rank; folded when saved.")] = "none",
    rank: Annotated[int, typer.Option(min=1, help="Of low-rank.")] = 8,
    bottleneck: Annotated[int, typer.Option(min=1, help="Width inside residual.")] = 128,
    decay_to_initial: Annotated[float, typer.Option(min=0.0, help="Weight decay towards the start.")] = 0.0,
    prompt_dropout: Annotated[float, typer.Option(min=0.0, help="Share of the prompt's numbers dropped.")] = 0.0,
    norm_bound: Annotated[float | None, typer.Option(help="Longest vector, in mean norms of token embeddings.")] = None,
    label_smoothing: Annotated[float, typer.Option(min=0.0, help="Share of the target spread.")] = 0.0,
    max_length: MaxLength = 512,
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the search in --output.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Finds the shortest prompt that is not significantly worse than the best, for the price of two runs."""
    from ..hf.loading import load_base_model
    from ..length_search.run import search as find
    from ..length_search.study import import_optuna
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import split_rows
    from ..tasks.tables import load_rows

    import_optuna()
    tried, rates = _numbers(lengths, int, "--lengths"), _rates(learning_rates)
    rows = load_rows(data, split)
    chosen = task_of_options(
        rows, task, text_column, label_column, prompt_column, response_column, template, label_word
    )
    chosen.max_length, chosen.model, chosen.prompt = max_length, model, name
    if validation is not None:
        apart = load_rows(validation, split)
    else:
        rows, apart = split_rows(rows, held_out, seed)
    base, tokenizer = load_base_model(model, dtype, device)
    try:
        find(
            (DeepPromptModel if deep else SoftPromptModel)(base),
            tokenizer,
            chosen,
            rows,
            apart,
            output,
            lengths=tried,
            learning_rates=rates,
            budget=budget,
            test_rows=[] if test is None else load_rows(test, split),
            resume=resume,
            console=console,
            steps=steps,
            init=init,
            init_text=init_text,
            placement=placement,
            objective=objective,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            best_by=best_by,
            reparameterization=reparameterization,
            rank=rank,
            bottleneck=bottleneck,
            decay_to_initial=decay_to_initial,
            prompt_dropout=prompt_dropout,
            norm_bound=norm_bound,
            label_smoothing=label_smoothing,
            seed=seed,
        )
    except KeyboardInterrupt:
        console.print("interrupted; go on with the same command and --resume")
        raise typer.Exit(130) from None
    console.print(
        f"use it: softprompt-fast predict --prompt {output / name} --data ...", highlight=False, soft_wrap=True
    )


def _rates(text: str | None) -> Any:
    from ..length_search.study import LogRange

    if text is None or ":" not in text:
        return None if text is None else _numbers(text, float, "--learning-rates")
    parts = text.split(":")
    try:
        return LogRange(float(parts[0]), float(parts[1]), *map(int, parts[2:]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--learning-rates must be like 1e-3,1e-2 or LOW:HIGH[:DRAWS] with LOW below HIGH, got {text!r}"
        ) from error


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from error
