"""Ensembles: several prompts of one task, tuned in one run, whose answers are combined.

Lester et al. 2021 (arXiv 2104.08691, section 6): one frozen model, m prompts, one vote each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from ..base.files import write_atomically
from ..evaluation.ensembles import COMBINATIONS, evaluate_ensemble
from ..evaluation.scores import describe_scores
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import Examples
from ..tasks.task import Task
from .job import TuningJob, TuningResult
from .run import tune_tasks
from .settings import TuningSettings

ENSEMBLE_FILE = "ensemble.json"
NOISE = 0.1
"""``init_noise`` of members that would otherwise start with the same values."""


@dataclass
class EnsembleResult:
    """The result of an ensemble's run."""

    members: list[TuningResult]
    combine: str
    scores: dict[str, float]
    """Held-out scores of the members' common decision, with each member's best values."""
    file: Path
    """Holds the members' names and how they are combined; ``softprompt-fast predict --ensemble`` reads it."""


def tune_ensemble(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    members: int | Sequence[str] = 5,
    combine: str = "mean_probability",
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    **changes: Any,
) -> EnsembleResult:
    """Tunes m prompts ``<task.prompt>-0`` .. ``-<m-1>`` of one task in one run, in mixed batches.

    Args:
        members: m, or an initialisation for each member. Members differ in the order of rows and in their initial
            values. If the initialisation draws nothing at random, a little noise is added.
        combine: see :meth:`SoftPromptPipeline.classify`.
        settings, changes: the settings of all members; see :func:`tune`.

    Raises:
        ValueError: the task is not a classification, or there are fewer than two members.
    """
    settings = (settings or TuningSettings()).with_changes(changes)
    if task.kind != "classification":
        raise ValueError(f"`task` must be a classification because texts cannot be averaged, got {task.kind!r}")
    if combine not in COMBINATIONS:
        raise ValueError(f"`combine` must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    inits = [settings.init] * members if isinstance(members, int) else list(members)
    if len(inits) < 2:
        raise ValueError(f"`members` must be at least 2, got {members}")
    draws = isinstance(settings.init, str) and settings.init in ("random", "vocabulary")
    noise = max(settings.init_noise, NOISE) if isinstance(members, int) and not draws else settings.init_noise
    jobs = [
        TuningJob(
            replace(task, prompt=f"{task.prompt}-{i}"),
            train_rows,
            held_out_rows,
            replace(
                settings,
                init=init,
                init_text=settings.init_text if init == "text" else None,
                seed=settings.seed + i,
                init_noise=noise if i else settings.init_noise,
            ),
        )
        for i, init in enumerate(inits)
    ]
    console = console or Console(stderr=True)
    results = tune_tasks(
        model,
        tokenizer,
        jobs,
        output,
        settings,
        resume=resume,
        report_to=report_to,
        callbacks=callbacks,
        console=console,
    )
    names = [job.task.prompt for job in jobs]
    tuned = Task.load(results[0].folder)  # with placement="after_bos", texts are encoded without BOS
    scores = evaluate_ensemble(
        model, tokenizer, tuned, held_out_rows, names, combine=combine, batch_size=settings.batch_size
    )
    mean_accuracy = sum(result.after["accuracy"] for result in results) / len(results)
    console.print(
        f"together: {describe_scores(scores)}; single members: {mean_accuracy:.3f} on average", highlight=False
    )
    file = Path(output) / ENSEMBLE_FILE
    facts = {"members": names, "combine": combine, "scores": scores, "mean_accuracy_of_members": mean_accuracy}
    write_atomically(file, json.dumps(facts, indent=2) + "\n")
    return EnsembleResult(results, combine, scores, file)
