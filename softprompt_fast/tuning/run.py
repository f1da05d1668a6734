"""Tuning from start to end: a frozen model, rows and a task give a tuned prompt on disk with its scores.

Several jobs run in one loop: each step is a mixed batch with rows of all jobs, each row with its own prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from ..base.modules import evaluating
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.reparameterization import fold
from ..tasks.examples import Examples
from ..tasks.task import Task
from .job import TuningJob, TuningResult
from .preparation import check_jobs, prepare
from .prompt_setup import check_form
from .results import save_results
from .settings import TuningSettings


def tune(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    **changes: Any,
) -> TuningResult:
    """Tunes ``task.prompt``, keeps its best values, and saves them with the task and the scores.

    Writes to ``output``: ``<prompt>/`` (PEFT adapter folder, ``task.json``, a model card and ``profile.json``, the
    reference for monitoring), ``metrics.json`` and ``checkpoints/``.

    Args:
        model: plain prompts, or a :class:`DeepPromptModel`. If it already has a prompt of the task's name, that prompt
            is tuned further.
        held_out_rows: scored during the run; they decide which values are best.
        resume: continue from the last checkpoint in ``output``.
        report_to: transformers' loggers, such as ("tensorboard",).
        callbacks: additional ``TrainerCallback`` objects of transformers.
        changes: settings by name, such as ``learning_rate=3e-3``.

    Raises:
        FileNotFoundError: ``resume`` was given, but ``output`` holds no run.
        FileExistsError: ``output`` already has this prompt, and ``resume`` was not given.
    """
    jobs = [TuningJob(task, train_rows, held_out_rows)]
    (result,) = tune_tasks(
        model,
        tokenizer,
        jobs,
        output,
        settings,
        resume=resume,
        report_to=report_to,
        callbacks=callbacks,
        console=console,
        **changes,
    )
    return result


def tune_tasks(
    model: SoftPromptModel,
    tokenizer: Any,
    jobs: Sequence[TuningJob],
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    shared_tokens: int = 0,
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    **changes: Any,
) -> list[TuningResult]:
    """Tunes several prompts in one run, one per job, in mixed batches; each prompt keeps its own best values.

    A step takes ``batch_size`` rows of each job. Jobs with fewer rows use each row more often.

    Args:
        shared_tokens: vectors that all prompts begin with and train together; each saved prompt holds a copy of them
            in front of its own.

    Other arguments, files and errors: see :func:`tune`.
    """
    settings = (settings or TuningSettings()).with_changes(changes)
    check_jobs(jobs, settings, shared_tokens)
    check_form(model, tokenizer, settings)
    if settings.placement == "after_bos":  # the prompt holds BOS, so texts are encoded without it
        jobs = [replace(job, task=replace(job.task, special_tokens=False, literal=False)) for job in jobs]
    from .training_loop import run  # imports transformers' Trainer, which takes long

    with _training_only(model, [job.task.prompt for job in jobs]):
        prepared = prepare(
            model,
            tokenizer,
            list(jobs),
            Path(output),
            settings,
            shared_tokens=shared_tokens,
            resume=resume,
            console=console or Console(stderr=True),
        )
        return save_results(prepared, run(prepared, report_to, callbacks))


@contextmanager
def _training_only(model: SoftPromptModel, names: list[str]) -> Iterator[None]:
    """Freezes the other prompts. At the end they are trainable again, modes are restored and ``names`` are plain."""
    others = {name: model.prompts[name].requires_grad for name in model.prompts if name not in names}
    for name in others:
        model.prompts.freeze_prompt(name)
    with evaluating(model):  # Trainer turns training on in each step
        try:
            yield
        finally:
            for name in names:
                if name in model.prompts:
                    fold(model.prompts, name)
            for name, trained in others.items():
                model.prompts.freeze_prompt(name, not trained)
