"""``train``: tunes a prompt, an ensemble, or a prompt for each of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..tuning.settings import TuningSettings
from .data import DataOptions, TaskOptions
from .heads import HeadOptions, TrainHead, check_head, head_task, model_to_train
from .next_steps import after_training, given_options
from .options import (
    DATA,
    OUTPUT,
    PROMPT,
    Adapter,
    Data,
    Deep,
    Device,
    Dtype,
    HeldOut,
    Model,
    PromptName,
    Quantize,
    Register,
    Validation,
    with_options,
)
from .output import console
from .prompts import refuse_with_head
from .versions import pinned, prepare_register, register_prompts

if TYPE_CHECKING:
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import Examples
    from ..tasks.task import Task
    from ..tuning.job import TuningJob

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the prompt and its scores.")]
Resume = Annotated[bool, typer.Option(help="Continue from the last checkpoint in --output.")]
TaskColumn = Annotated[
    str | None,
    typer.Option(help="Column that names each row's task. Each task gets its own prompt.", rich_help_panel=DATA),
]
SharedTokens = Annotated[
    int,
    typer.Option(
        min=0, help="Vectors that the prompts of all tasks have in common (--task-column).", rich_help_panel=PROMPT
    ),
]
Members = Annotated[int, typer.Option(min=1, help="Prompts of an ensemble, tuned in one run.", rich_help_panel=PROMPT)]
MemberInit = Annotated[
    list[str] | None,
    typer.Option(help="Initial values of a member of an ensemble. Repeat it for each member.", rich_help_panel=PROMPT),
]
TensorBoard = Annotated[
    bool, typer.Option(help="Write TensorBoard logs to --output/checkpoints/runs.", rich_help_panel=OUTPUT)
]
PURPOSES = ("score it on rows with labels", "label new rows", "continue training")
"""What the commands at the end are for."""


@with_options("task_options", TaskOptions)
@with_options("head_options_of", HeadOptions)
@with_options("settings_of", TuningSettings)
@with_options("data_options_of", DataOptions)
def train(
    context: typer.Context,
    model: Model,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    task_options: Callable[..., TaskOptions],
    head_options_of: Callable[..., HeadOptions],
    settings_of: Callable[..., TuningSettings],
    adapter: Adapter = None,
    output: Output = Path("prompts"),
    resume: Resume = False,
    validation: Validation = None,
    held_out: HeldOut = 0.1,
    task_column: TaskColumn = None,
    shared_tokens: SharedTokens = 0,
    members: Members = 1,
    member_init: MemberInit = None,
    name: PromptName = "prompt",
    deep: Deep = False,
    train_head: TrainHead = None,
    tensorboard: TensorBoard = False,
    register: Register = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
) -> None:
    """Tunes a soft prompt on rows of data and keeps the best checkpoint. Also tunes ensembles, or several tasks."""
    data_options = data_options_of()
    require("train", "accelerate", "datasets", "sklearn", purpose="train")
    if tensorboard:
        require("train", "tensorboard", purpose="--tensorboard")
    _check_prompt_name(name, "--name")
    settings = prepare_register(register, settings_of(init="text") if "text" in (member_init or ()) else settings_of())
    member_init = member_init and [pinned(init) for init in member_init]
    several = _members(members, member_init, task_column, shared_tokens)
    options, head_options = task_options(), head_options_of()
    check_head(head_options, options, train_head, deep=deep, task_column=task_column, several=several != 1)
    if head_options.head is not None:
        refuse_with_head(adapter, quantize)
    from ..tuning.ensemble import tune_ensemble
    from ..tuning.run import tune_tasks

    def task_of(rows: Examples, prompt: str) -> Task:
        if head_options.head is not None:
            return head_task(head_options, options, rows, model, prompt=prompt)
        return options.task(rows, model=model, prompt=prompt)

    rows = data_options.read(data)
    held_out_rows = data_options.read(validation) if validation is not None else None
    groups = {name: rows} if task_column is None else _groups(rows, task_column)
    held_out_groups = None if held_out_rows is None else _held_out_groups(groups, held_out_rows, task_column, name)
    jobs = _jobs(groups, held_out_groups, task_of, held_out, settings.seed)
    loading: dict[str, Any] = {"adapter": adapter, "quantize": quantize}
    tuned, tokenizer = _model(model, jobs, deep, train_head, dtype, device, **loading)
    loggers = ("tensorboard",) if tensorboard else ()
    common: dict[str, Any] = {"resume": resume, "report_to": loggers, "console": console}
    if several != 1:
        (job,) = jobs
        ensemble = tune_ensemble(
            tuned, tokenizer, job.task, job.train_rows, job.held_out_rows, output, settings, members=several, **common
        )
        results = ensemble.members
    else:
        results = tune_tasks(tuned, tokenizer, jobs, output, settings, shared_tokens=shared_tokens, **common)
    if results[0].interrupted:
        console.print(
            f"interrupted at step {results[0].steps}; run the same command with --resume to continue", markup=False
        )
    register_prompts(None if results[0].interrupted else register, [result.folder for result in results])
    more = {"--ensemble": several != 1, "--prompt-name-column": task_column}
    folder = output if several != 1 or task_column is not None else results[0].folder
    commands = after_training(given_options(context), results, prompt=str(folder), more=more)
    for purpose, command in zip(PURPOSES, commands, strict=True):
        console.print(f"{purpose}:\n  {command}", highlight=False, markup=False, soft_wrap=True)


def _members(
    members: int, member_init: list[str] | None, task_column: str | None, shared_tokens: int
) -> int | list[str]:
    """The members of an ensemble: their number, or the initial values of each; 1: no ensemble."""
    if member_init and members not in (1, len(member_init)):
        raise ValueError(f"--members must be {len(member_init)}, one for each --member-init, got {members}")
    several = member_init or members
    if task_column is not None and several != 1:
        raise ValueError("--members cannot be combined with --task-column")
    if shared_tokens and task_column is None:
        raise ValueError("--shared-tokens cannot be used without --task-column")
    return several


def _model(
    name: str,
    jobs: Sequence[TuningJob],
    deep: bool,
    train_head: bool | None,
    dtype: str,
    device: str | None,
    **loading: str | None,
) -> tuple[SoftPromptModel, Any]:
    """The model that the jobs' tasks need, and its tokenizer."""
    from ..hf.loading import load_base_model
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel

    if jobs[0].task.head is not None:
        return model_to_train(jobs[0].task, train_head, dtype, device)
    base, tokenizer = load_base_model(name, dtype, device, console=console, **loading)
    for job in jobs:
        job.task.read_chat(tokenizer)
    return (DeepPromptModel if deep else SoftPromptModel)(base), tokenizer


def _jobs(
    groups: Mapping[str, Examples],
    held_out_groups: Mapping[str, Examples] | None,
    task_of: Callable[[Examples, str], Task],
    held_out: float,
    seed: int,
) -> list[TuningJob]:
    """The task and the rows of each prompt.

    Args:
        held_out_groups: None: a part of the rows is held out.
        task_of: makes the task of all rows of a prompt.
    """
    from ..tasks.examples import complete_rows, split_rows
    from ..tasks.rows import joined
    from ..tuning.job import TuningJob

    jobs = []
    for name, group in groups.items():
        task = task_of(joined(group, (held_out_groups or {}).get(name, [])), name)
        own = complete_rows(task, group)
        if held_out_groups is None:
            jobs.append(TuningJob(task, *split_rows(own, held_out, seed)))
        else:
            jobs.append(TuningJob(task, own, complete_rows(task, held_out_groups[name])))
    return jobs


def _held_out_groups(
    groups: Mapping[str, Examples], held_out_rows: Examples, column: str | None, name: str
) -> dict[str, Examples]:
    """The held-out rows of each task."""
    held_out_groups = {name: held_out_rows} if column is None else _groups(held_out_rows, column)
    if unknown := sorted(set(held_out_groups) - set(groups)):
        raise ValueError(f"the held-out rows must be of tasks in --data, got {', '.join(unknown)}")
    if missing := sorted(set(groups) - set(held_out_groups)):
        raise ValueError(f"the held-out rows must hold rows of every task, got none of {', '.join(missing)}")
    return held_out_groups


def _groups(rows: Examples, column: str) -> dict[str, Examples]:
    """The rows of each task."""
    from ..tasks.rows import grouped, place
    from ..tasks.values import is_missing, label_name

    def task_of(index: int) -> str:
        row = rows[index]
        if column not in row:
            raise ValueError(f"no column {column!r} in the data, which has {', '.join(row)}")
        if is_missing(row[column]):
            raise ValueError(f"column {column!r} must name each row's task, got nothing in {place(rows, index)}")
        return label_name(row[column], column)

    groups = grouped(rows, task_of)
    for task in groups:
        _check_prompt_name(task, f"a task of column {column!r}")
    return groups


def _check_prompt_name(name: str, what: str) -> None:
    """Checks a name of a prompt; an error says where it comes from."""
    from ..prompts.fast_soft_prompt import check_name

    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(str(error).replace("`name`", what)) from error
