"""The end of a tuning run: the best values of each prompt, its folder, ``metrics.json``, the reference profile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..base.files import write_atomically
from ..evaluation.profile import record_profile
from ..evaluation.scores import describe_scores
from ..hf.heads import head_parameters
from ..prompts.card import write_card
from ..prompts.placement import freeze_first, frozen_count
from ..prompts.reparameterization import fold
from ..prompts.run_files import DIGEST, METRICS_FILE, weights_digest
from ..tasks.examples import Examples
from ..tasks.rows import file_names
from .best import BestPrompts
from .job import TuningResult
from .preparation import Prepared, line_prefix
from .record import History


@dataclass(frozen=True)
class Outcome:
    """The result of the training loop."""

    best: BestPrompts
    history: History
    seconds: float
    """Time in the loop, evaluations included."""
    evaluation_seconds: float
    steps: int
    interrupted: bool
    main_process: bool
    """Whether this process writes the files that all processes share."""


def save_results(prepared: Prepared, outcome: Outcome) -> list[TuningResult]:
    """Gives each prompt its best values in plain form, and saves it with its task, the scores and a card."""
    results = []
    for job, before, history in zip(prepared.jobs, prepared.before, outcome.history, strict=True):
        name = job.task.prompt
        folder = prepared.output / name
        trained = _trainable_parameters(prepared, name)
        frozen = frozen_count(prepared.model.prompts, name)
        fold(prepared.model.prompts, name)
        after = outcome.best.restore(name)
        freeze_first(prepared.model.prompts, name, frozen)  # a deep prompt's folder says it
        prepared.model.save_pretrained(prepared.output, [name])
        job.task.save(folder)
        results.append(
            TuningResult(
                folder=folder,
                before=before,
                after=after,
                tuning_seconds=outcome.seconds,
                evaluation_seconds=outcome.evaluation_seconds,
                steps=outcome.steps,
                best_step=outcome.best.entries[name]["step"],
                interrupted=outcome.interrupted,
                trainable_parameters=trained,
                history=history,
            )
        )
        prefix = line_prefix(job, prepared.jobs)
        line = f"{prefix}with the prompt: {describe_scores(after)}; saved in {folder}"
        prepared.console.print(line, highlight=False, markup=False, soft_wrap=True)
    if outcome.main_process:
        _write_metrics(prepared, results)
    for job, result in zip(prepared.jobs, results, strict=True):
        if job.scorer is not None:  # a search records the profile and writes the card of the prompt that it chooses
            continue
        profile = None
        if job.task.head is None:  # monitoring does not know heads
            profile = record_profile(
                prepared.model,
                prepared.tokenizer,
                job.task,
                job.held_out_rows,
                result.folder,
                source="held-out rows of the training run, which chose the checkpoint",
                batch_size=prepared.settings.batch_size,
            )
        if outcome.main_process:
            if profile is not None:
                profile.save(result.folder)
            write_card(result.folder)
    return results


def _trainable_parameters(prepared: Prepared, name: str) -> int:
    bank, settings = prepared.model.prompts, prepared.settings
    forms = bank.forms(name)
    values = [bank[name]] if forms is None else list(forms.parameters())
    values += bank.token_update(name) or ()
    if prepared.model.trains_head:
        values += head_parameters(prepared.model.base_model, prepared.model.head_modules)
    count = sum(value.numel() for value in values if value.requires_grad)
    low_rank = settings.reparameterization == "low-rank"
    return count - frozen_count(bank, name) * (settings.rank if low_rank else bank[name].shape[1])


def _write_metrics(prepared: Prepared, results: list[TuningResult]) -> None:
    metrics: dict[str, Any] = {
        "tuning_seconds": results[0].tuning_seconds,
        "evaluation_seconds": results[0].evaluation_seconds,
        "steps": results[0].steps,
        "seed": prepared.settings.seed,
        "settings": prepared.settings.to_json(),
    }
    names = ("before", "after", "best_step", "trainable_parameters", "history")
    scores = [{name: getattr(result, name) for name in names} for result in results]
    for values, job, result in zip(scores, prepared.jobs, results, strict=True):
        values["data"] = {"train": _data(job.train_rows), "held_out": _data(job.held_out_rows)}
        values[DIGEST] = weights_digest(result.folder)
    if len(results) == 1:
        metrics = scores[0] | metrics
    else:
        metrics["prompts"] = dict(zip(prepared.names, scores, strict=True))
    write_atomically(prepared.output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def _data(rows: Examples) -> dict[str, Any]:
    return {"files": file_names(rows), "rows": len(rows)}
