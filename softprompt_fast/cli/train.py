"""The command line's part that tunes prompts: ``train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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

Examples = list[dict[str, Any]]


@app.command()
def train(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the prompt and its scores go.")] = Path(
        "prompts"
    ),
    task: Kind = TaskKind.classification,
    name: Annotated[str, typer.Option(help="The prompt's name.")] = "prompt",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    template: Template = None,
    label_word: LabelWords = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows; default: a part of the data.")] = None,
    held_out: Annotated[float, typer.Option(help="Share (below 1) or number of rows held out, of each task.")] = 0.1,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    max_length: MaxLength = 512,
    # What is tuned.
    deep: Annotated[bool, typer.Option(help="Tune keys and values of every layer (prefix tuning).")] = False,
    virtual_tokens: Annotated[int | None, typer.Option("--virtual-tokens", "-P", min=1, help="Default 20.")] = None,
    init: Annotated[
        str, typer.Option(help="auto, random, vocabulary, text, class_labels, or a saved prompt to start from.")
    ] = "auto",
    init_text: Annotated[str | None, typer.Option(help="Text whose tokens start the prompt (--init text).")] = None,
    init_noise: Annotated[float, typer.Option(min=0.0, help="Noise on the first values, in their own spread.")] = 0.0,
    placement: Annotated[str, typer.Option(help="before_bos or after_bos.")] = "before_bos",
    reparameterization: Annotated[str, typer.Option(help="none, residual or low-rank; folded when saved.")] = "none",
    rank: Annotated[int, typer.Option(min=1, help="Of low-rank.")] = 8,
    bottleneck: Annotated[int, typer.Option(min=1, help="Width inside residual.")] = 128,
    token_update_rank: Annotated[
        int | None, typer.Option(min=1, help="DePT: rank of an update of the text's token embeddings; none by default.")
    ] = None,
    token_update_learning_rate: Annotated[float, typer.Option(help="Of that update.")] = 1e-3,
    # Several prompts at once.
    members: Annotated[int, typer.Option(min=1, help="Prompts of an ensemble, tuned at once.")] = 1,
    member_init: Annotated[
        list[str] | None, typer.Option(help="An initialisation for each member of an ensemble; several times.")
    ] = None,
    task_column: Annotated[
        str | None, typer.Option(help="Column naming each row's task: a prompt for each, tuned at once.")
    ] = None,
    shared_tokens: Annotated[
        int, typer.Option(min=0, help="Vectors that the prompts of all tasks have in common.")
    ] = 0,
    # How.
    objective: Annotated[str, typer.Option(help="Cross entropy among labels, or among the vocabulary.")] = "labels",
    label_smoothing: Annotated[float, typer.Option(min=0.0, help="Share of the target spread.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or adafactor.")] = "adamw",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 3e-2,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    batch_size: BatchSize = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps; default 120, unless epochs are given.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Passes over the rows, instead of steps.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    best_by: Annotated[str, typer.Option(help="The best state has the lowest loss, or the highest accuracy.")] = "loss",
    patience: Annotated[int | None, typer.Option(min=1, help="Evaluations without a gain before it stops.")] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients longer than this are scaled down.")] = 1.0,
    decay_to_initial: Annotated[float, typer.Option(min=0.0, help="Weight decay towards the start.")] = 0.0,
    prompt_dropout: Annotated[float, typer.Option(min=0.0, help="Share of the prompt's numbers dropped.")] = 0.0,
    norm_bound: Annotated[float | None, typer.Option(help="Longest vector, in mean norms of token embeddings.")] = None,
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Log to --output/checkpoints/runs.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Tunes a soft prompt on rows of data and keeps the best one; or several, of an ensemble or of several tasks."""
    from ..hf.loading import load_base_model
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import split_rows
    from ..tasks.tables import load_rows
    from ..tuning.ensemble import tune_ensemble
    from ..tuning.job import TuningJob
    from ..tuning.run import tune_tasks
    from ..tuning.settings import TuningSettings

    settings = TuningSettings(
        num_virtual_tokens=virtual_tokens,
        init="text" if "text" in (member_init or ()) else init,
        init_text=init_text,
        init_noise=init_noise,
        objective=objective,
        label_smoothing=label_smoothing,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        steps=steps,
        epochs=epochs,
        eval_every=eval_every,
        best_by=best_by,
        patience=patience,
        max_grad_norm=max_grad_norm,
        decay_to_initial=decay_to_initial,
        prompt_dropout=prompt_dropout,
        norm_bound=norm_bound,
        reparameterization=reparameterization,
        rank=rank,
        bottleneck=bottleneck,
        token_update_rank=token_update_rank,
        token_update_learning_rate=token_update_learning_rate,
        placement=placement,
        seed=seed,
    )
    if member_init and members not in (1, len(member_init)):
        raise ValueError(f"--members must be {len(member_init)}, one for each --member-init, got {members}")
    several = member_init or members
    if task_column is not None and several != 1:
        raise ValueError("--members must be 1 with --task-column: an ensemble is of one task")
    if shared_tokens and task_column is None:
        raise ValueError(f"--shared-tokens must be 0 without --task-column, got {shared_tokens}")
    rows = load_rows(data, split)
    held_out_rows = load_rows(validation, split) if validation is not None else None
    if held_out_rows is None and task_column is None:
        rows, held_out_rows = split_rows(rows, held_out, seed)

    def the_task(rows: list[dict[str, Any]], name: str) -> Any:
        found = task_of_options(
            rows, task, text_column, label_column, prompt_column, response_column, template, label_word
        )
        return replace(found, max_length=max_length, model=model, prompt=name)

    jobs = [
        TuningJob(the_task(own + apart, own_name), own, apart)
        for own_name, own, apart in _by_task(
            rows, held_out_rows, task_column, name, lambda own: split_rows(own, held_out, seed)
        )
    ]
    base, tokenizer = load_base_model(model, dtype, device)
    tuned = (DeepPromptModel if deep else SoftPromptModel)(base)
    common: dict[str, Any] = {
        "resume": resume,
        "report_to": ("tensorboard",) if tensorboard else (),
        "console": console,
    }
    if several != 1:
        (job,) = jobs
        found = tune_ensemble(
            tuned, tokenizer, job.task, job.train_rows, job.held_out_rows, output, settings, members=several, **common
        )
        results = found.members
    else:
        results = tune_tasks(tuned, tokenizer, jobs, output, settings, shared_tokens=shared_tokens, **common)
    if results[0].interrupted:
        console.print(f"interrupted at step {results[0].steps}; go on with the same command and --resume")


def _by_task(
    rows: Examples,
    held_out_rows: Examples | None,
    column: str | None,
    name: str,
    split: Callable[[Examples], tuple[Examples, Examples]],
) -> list[tuple[str, Examples, Examples]]:
    """Name, rows and held-out rows of each task; without held-out rows, each task's rows are split."""
    if column is None:
        assert held_out_rows is not None
        return [(name, rows, held_out_rows)]
    own = _groups(rows, column)
    if held_out_rows is None:
        return [(task, *split(part)) for task, part in own.items()]
    apart = _groups(held_out_rows, column)
    if unknown := sorted(set(apart) - set(own)):
        raise ValueError(f"the held-out rows must be of tasks that are trained, got {', '.join(unknown)}")
    if missing := sorted(set(own) - set(apart)):
        raise ValueError(f"the held-out rows must hold some of every task, got none of {', '.join(missing)}")
    return [(task, part, apart[task]) for task, part in own.items()]


def _groups(rows: Examples, column: str) -> dict[str, Examples]:
    from ..prompts.fast_soft_prompt import check_name

    found: dict[str, Examples] = {}
    for number, row in enumerate(rows):
        if column not in row:
            raise ValueError(f"no column {column!r} in the data, which has {list(row)}")
        if row[column] in (None, ""):
            raise ValueError(f"column {column!r} must name each row's task, got nothing in row {number}")
        found.setdefault(str(row[column]), []).append(row)
    for task in found:
        check_name(task)
    return found
