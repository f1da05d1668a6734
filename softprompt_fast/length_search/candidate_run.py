"""One candidate in one rung: a short run of ``tune`` that continues from its prompt of the rung before."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.prompt_scoring import score_prompts
from ..evaluation.scores import RowScores, describe_scores
from ..tasks.examples import Examples
from ..tasks.task import Task
from ..tuning.job import TuningJob, TuningResult
from ..tuning.record import CHECKPOINTS_FOLDER
from ..tuning.run import tune_tasks
from ..tuning.settings import TuningSettings
from .budget import Rung
from .preparation import PreparedSearch
from .result import Candidate, RungResult
from .study import Memory
from .table import status

ROWS_FILE = "rows.safetensors"


class CandidateRunner:
    """Trains and scores candidates.

    Args:
        before: held-out scores of the model without a prompt.
    """

    def __init__(self, prepared: PreparedSearch, memory: Memory, before: dict[str, float]) -> None:
        self.prepared = prepared
        self.memory = memory
        self.before = before

    def run(self, candidate: Candidate, number: int, rung: Rung) -> None:
        """Trains a candidate through a rung, unless that is already done, and adds the result to it."""
        prepared = self.prepared
        key, folder = f"rung {number}", prepared.folder(candidate, number)
        stored = self.memory.recall(candidate.number, key)
        if stored is None:
            shown = f"rung {number} of {len(prepared.plan.rungs)}: {prepared.name(candidate)}, {rung.steps} steps"
            with status(prepared.console, shown):
                stored = asdict(self._train(candidate, number, rung, folder))
            self.memory.store(candidate.number, key, stored)
            scores = describe_scores(stored["scores"])
            prepared.console.print(f"{shown}: {scores}, {stored['seconds']:.1f} s", highlight=False)
        candidate.rungs.append(RungResult(**stored))
        candidate.rows = _read_rows(folder / ROWS_FILE)
        self.memory.report(candidate.number, rung.total_steps, candidate.last.scores[prepared.best_by])

    def _train(self, candidate: Candidate, number: int, rung: Rung, folder: Path) -> RungResult:
        start = time.perf_counter()
        if folder.exists():  # from a run that was interrupted
            shutil.rmtree(folder)
        prepared = self.prepared
        if number > 1:
            name = prepared.task.prompt
            prepared.model.load_prompt(prepared.folder(candidate, number - 1) / name, name)
        settings = replace(
            prepared.settings,
            num_virtual_tokens=candidate.num_virtual_tokens,
            learning_rate=candidate.learning_rate,
            steps=rung.steps,
            eval_every=rung.steps,
        )
        result, rows = self._tune(rung, settings, folder)
        if result.interrupted:
            raise KeyboardInterrupt
        _write_rows(folder / ROWS_FILE, rows)
        shutil.rmtree(folder / CHECKPOINTS_FOLDER)
        return RungResult(
            rung=number,
            steps=rung.steps,
            total_steps=rung.total_steps,
            scores=rows.summary(),
            training_seconds=result.tuning_seconds - result.evaluation_seconds,
            scoring_seconds=result.evaluation_seconds,
            seconds=time.perf_counter() - start,
        )

    def _tune(self, rung: Rung, settings: TuningSettings, folder: Path) -> tuple[TuningResult, RowScores]:
        """The run and its last row scores; the model has no prompt afterwards."""
        prepared, model, name = self.prepared, self.prepared.model, self.prepared.task.prompt
        task = replace(prepared.task)
        held_out = prepared.held_out_rows[: rung.rows]
        scored: list[RowScores] = []

        def scorer(prompt: str | None) -> dict[str, float]:
            if prompt is None:
                return self.before
            scored.append(score(prepared, task, held_out, model.prompts.snapshot(prompt)))
            return scored[-1].summary()

        job = TuningJob(task, self._train_rows(rung), held_out, scorer=scorer)
        try:
            (result,) = tune_tasks(model, prepared.tokenizer, [job], folder, settings, console=Console(quiet=True))
        finally:
            if name in model.prompts:
                model.remove_prompt(name)
        return result, scored[-1]

    def _train_rows(self, rung: Rung) -> Examples:
        """As many rows as the rung's steps take; other rows than those of earlier rungs, as far as there are any."""
        rows, per_step = self.prepared.train_rows, self.prepared.rows_per_step
        wanted = rung.steps * per_step
        if wanted >= len(rows):
            return rows
        first = (rung.total_steps - rung.steps) * per_step % len(rows)
        return (rows + rows)[first : first + wanted]


def score(prepared: PreparedSearch, task: Task, rows: Examples, values: Tensor | None) -> RowScores:
    """Row scores of one prompt [P, D]; None: without a prompt."""
    batch_size = prepared.settings.batch_size
    scores = score_prompts(prepared.model, prepared.tokenizer, task, rows, {"prompt": values}, batch_size=batch_size)
    return scores["prompt"]


def _write_rows(file: Path, rows: RowScores) -> None:
    save_file({key: value for key, value in vars(rows).items() if value is not None}, file)


def _read_rows(file: Path) -> RowScores:
    values: dict[str, Any] = {"predicted": None, "correct": None} | load_file(file)
    return RowScores(**values)
