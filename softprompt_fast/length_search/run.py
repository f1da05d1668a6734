"""The search: rungs of short runs of ``tune``, each going on from the candidate's prompt of the rung before."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from ..base.figures import save_figure
from ..evaluation.prompt_scoring import score_prompts
from ..evaluation.scores import RowScores, describe_scores
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import Examples
from ..tasks.task import Task
from ..tuning.job import TuningJob
from ..tuning.prepare import check_form
from ..tuning.run import tune_tasks
from ..tuning.settings import TuningSettings
from .budget import EVALUATIONS, Rung, make_plan
from .figure import search_figure
from .prepare import check_rows, checked_lengths, checked_rates, checked_settings, facts, full_length, measure_costs
from .result import FIGURE, Candidate, RungResult, SearchResult, judge, promote
from .significance import compare
from .study import LogRange, Memory
from .table import print_plan, print_result

DEFAULT_LENGTHS = (1, 2, 5, 10, 20, 50, 100)
TRIALS = "trials"
ROWS_FILE = "rows.safetensors"


def search(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    learning_rates: Sequence[float] | LogRange | None = None,
    budget: float = 2.0,
    test_rows: Examples = (),  # type: ignore[assignment]
    resume: bool = False,
    console: Console | None = None,
    **changes: Any,
) -> SearchResult:
    """Tries prompt lengths by successive halving; saves the shortest that is not significantly worse than the best.

    Leaves in ``output``: ``<prompt>/`` (the recommended one, as :func:`tune` saves it), ``search.json``,
    ``search.svg``, ``trials/`` (every candidate's prompt and row scores after each rung) and ``study.jsonl``, an Optuna
    journal. The model holds the recommended prompt at the end.

    Args:
        model: plain prompts, or a :class:`DeepPromptModel`; has no prompt of the task's name yet.
        held_out_rows: score the candidates, and so choose among them. Early rungs may use a part of them.
        settings: of all candidates; ``steps`` are those of one full run (120).
        learning_rates: to try with every length, or a range to draw from; None: the settings' one.
        budget: what all candidates together may cost, in full runs: optimiser steps, and estimated time.
        test_rows: score the recommended and the best prompt at the end; they choose nothing and are not in the budget.
        resume: go on with the search in ``output``; finished rungs are not repeated.
        changes: settings by name, such as ``steps=200``.

    Raises:
        ImportError: Optuna is not installed.
        FileExistsError: ``output`` already has a search, and ``resume`` was not asked for.
        FileNotFoundError: ``resume`` without a search.
        KeyboardInterrupt: at Ctrl-C; what was finished is kept for ``resume``.
    """
    settings = checked_settings((settings or TuningSettings()).with_changes(changes))
    if task.prompt in model.prompts:
        raise ValueError(f"`model` must not have a prompt {task.prompt!r} yet; remove it, or name the task's otherwise")
    check_rows(task, train_rows, held_out_rows, list(test_rows))
    check_form(model, tokenizer, settings)
    run = _Search(
        model,
        tokenizer,
        replace(task, special_tokens=settings.placement != "after_bos"),
        train_rows,
        held_out_rows,
        Path(output),
        settings,
        checked_lengths(lengths, settings),
        checked_rates(learning_rates, settings),
        budget,
        console or Console(stderr=True),
    )
    run.start(resume)
    finalists = run.rungs()
    return run.finish(finalists, list(test_rows))


class _Search:
    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any,
        task: Task,
        train_rows: Examples,
        held_out_rows: Examples,
        output: Path,
        settings: TuningSettings,
        lengths: list[int],
        rates: list[float] | LogRange,
        budget: float,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.task, self.output = model, tokenizer, task, output
        self.settings, self.lengths, self.rates, self.console = settings, lengths, rates, console
        self.facts = facts(model, task, train_rows, held_out_rows, settings, lengths, rates, budget)
        self.best_by = settings.best_by if task.kind == "classification" else "loss"
        draws = rates.draws if isinstance(rates, LogRange) else len(rates)
        longest = max(lengths) + (settings.placement == "after_bos")
        costs = measure_costs(model, tokenizer, task, train_rows, held_out_rows, settings, longest)
        assert settings.steps is not None
        every = [length for length in lengths for _ in range(draws)]
        self.plan = make_plan(costs, every, settings.steps, full_length(lengths), budget)
        # Rungs take rows in this order: all candidates of a rung learn from, and are scored by, the same.
        self.train_rows = random.Random(settings.seed).sample(train_rows, len(train_rows))
        self.held_out_rows = random.Random(settings.seed).sample(held_out_rows, len(held_out_rows))

    def start(self, resume: bool) -> None:
        """The plan, the candidates, and the scores without a prompt."""
        direction = "maximize" if self.best_by == "accuracy" else "minimize"
        self.memory = Memory(self.output, self.facts, direction, resume)
        print_plan(self.plan, self.console)
        drawn = self.memory.ask(self.lengths, self.rates, self.settings.seed)
        self.candidates = [Candidate(**values) for values in drawn]
        stored = self.memory.recall(None, "before")
        if stored is None:
            with self._status("scoring the model without a prompt"):
                start = time.perf_counter()
                bare = replace(self.task, special_tokens=True)
                scores = self._score(bare, self.held_out_rows, {"none": None})["none"].summary()
            stored = {"scores": scores, "seconds": time.perf_counter() - start}
            self.memory.store(None, "before", stored)
        self.before, self.before_seconds = stored["scores"], stored["seconds"]
        self.console.print(f"without a prompt: {describe_scores(self.before)}", highlight=False)

    def rungs(self) -> list[Candidate]:
        """Trains and scores rung by rung; returns the candidates of the last one."""
        alive = self.candidates
        rungs = self.plan.rungs
        for number, rung in enumerate(rungs):
            for candidate in alive:
                self._run(candidate, number + 1, rung)
            if number + 1 == len(rungs):
                judge(alive, self.best_by)
                break
            going_on = promote(alive, rungs[number + 1].candidates, self.best_by)
            for candidate in alive:
                if candidate not in going_on:
                    self.memory.end(candidate.number, pruned=True)
            alive = going_on
            shown = ", ".join(self._name(c) for c in alive)
            self.console.print(f"rung {number + 1} done; going on: {shown}", highlight=False)
        for candidate in alive:
            self.memory.end(candidate.number, pruned=False)
        return alive

    def finish(self, finalists: list[Candidate], test_rows: Examples) -> SearchResult:
        best, recommended = judge(finalists, self.best_by)
        assert best.rows is not None and recommended.rows is not None
        name = self.task.prompt
        self._copy(self._folder(recommended, len(recommended.rungs)) / name, self.output / name)
        last = recommended.last
        seconds = self.before_seconds + sum(rung.seconds for c in self.candidates for rung in c.rungs)
        assert self.settings.steps is not None
        full = (
            self.settings.steps * last.training_seconds / last.steps
            + EVALUATIONS * last.scoring_seconds
            + self.before_seconds
        )
        result = SearchResult(
            self.output / name,
            self.plan,
            self.before,
            self.candidates,
            best,
            recommended,
            None if best is recommended else compare(recommended.rows, best.rows, self.best_by),
            self.best_by,
            self._test(recommended, best, test_rows),
            sum(rung.steps for c in self.candidates for rung in c.rungs),
            seconds,
            full,
            self.settings.batch_size * self.settings.gradient_accumulation_steps,
        )
        result.write(self.output)
        save_figure(search_figure(result), self.output / FIGURE)
        self.model.load_prompt(result.folder, name)
        print_result(result, self.console)
        return result

    # --- one candidate ---

    def _run(self, candidate: Candidate, number: int, rung: Rung) -> None:
        """Trains a candidate through a rung, unless that was done, and adds its scores."""
        key, folder = f"rung {number}", self._folder(candidate, number)
        stored = self.memory.recall(candidate.number, key)
        if stored is None:
            shown = f"rung {number} of {len(self.plan.rungs)}: {self._name(candidate)}, {rung.steps} steps"
            with self._status(shown):
                stored = asdict(self._train(candidate, number, rung, folder))
            self.memory.store(candidate.number, key, stored)
            scores = describe_scores(stored["scores"])
            self.console.print(f"{shown}: {scores}, {stored['seconds']:.1f} s", highlight=False)
        candidate.rungs.append(RungResult(**stored))
        candidate.rows = self._read_rows(folder)
        self.memory.report(candidate.number, rung.total_steps, candidate.last.scores[self.best_by])

    def _train(self, candidate: Candidate, number: int, rung: Rung, folder: Path) -> RungResult:
        start = time.perf_counter()
        if folder.exists():  # left by a run that did not end
            shutil.rmtree(folder)
        name, model = self.task.prompt, self.model
        if number > 1:
            model.load_prompt(self._folder(candidate, number - 1) / name, name)
        settings = replace(
            self.settings,
            num_virtual_tokens=candidate.num_virtual_tokens,
            learning_rate=candidate.learning_rate,
            steps=rung.steps,
            eval_every=rung.steps,
        )
        task = replace(self.task)
        scored: list[RowScores] = []
        held_out = self.held_out_rows[: rung.rows]

        def scorer(prompt: str | None) -> dict[str, float]:
            if prompt is None:
                return self.before
            scored.append(self._score(task, held_out, {prompt: model.prompts.snapshot(prompt)})[prompt])
            return scored[-1].summary()

        job = TuningJob(task, self._rows(rung), held_out, scorer=scorer)
        try:
            (result,) = tune_tasks(model, self.tokenizer, [job], folder, settings, console=Console(quiet=True))
        finally:
            if name in model.prompts:
                model.remove_prompt(name)
        if result.interrupted:
            raise KeyboardInterrupt
        rows = scored[-1]
        save_file(
            {key: value for key, value in vars(rows).items() if value is not None},
            folder / ROWS_FILE,
        )
        shutil.rmtree(folder / "checkpoints")
        return RungResult(
            number,
            rung.steps,
            rung.total_steps,
            rows.summary(),
            result.tuning_seconds - result.evaluation_seconds,
            result.evaluation_seconds,
            time.perf_counter() - start,
        )

    def _rows(self, rung: Rung) -> Examples:
        """As many as the rung's steps take, other ones than those of the rungs before as far as there are."""
        per_step = self.settings.batch_size * self.settings.gradient_accumulation_steps
        wanted, total = rung.steps * per_step, len(self.train_rows)
        if wanted >= total:
            return self.train_rows
        first = (rung.total_steps - rung.steps) * per_step % total
        return (self.train_rows + self.train_rows)[first : first + wanted]

    def _score(self, task: Task, rows: Examples, prompts: dict[str, torch.Tensor | None]) -> dict[str, RowScores]:
        return score_prompts(self.model, self.tokenizer, task, rows, prompts, batch_size=self.settings.batch_size)

    def _test(self, recommended: Candidate, best: Candidate, rows: Examples) -> dict[str, dict[str, float]]:
        if not rows:
            return {}
        found = {}
        for role, candidate in (("recommended", recommended), ("best", best)):
            values = self.model.read_prompt(self._folder(candidate, len(candidate.rungs)) / self.task.prompt)
            found[role] = self._score(self.task, rows, {role: values})[role].summary()
        return found

    # --- files and names ---

    def _folder(self, candidate: Candidate, number: int) -> Path:
        name = f"{candidate.number:03d}-length-{candidate.num_virtual_tokens}-lr-{candidate.learning_rate:g}"
        return self.output / TRIALS / name / f"rung-{number}"

    def _name(self, candidate: Candidate) -> str:
        count = candidate.num_virtual_tokens
        shown = f"{count} token{'s' if count > 1 else ''}"
        several = isinstance(self.rates, LogRange) or len(self.rates) > 1
        return f"{shown} at learning rate {candidate.learning_rate:.2g}" if several else shown

    def _status(self, text: str) -> AbstractContextManager[Any]:
        return self.console.status(text) if self.console.is_terminal else nullcontext()

    @staticmethod
    def _read_rows(folder: Path) -> RowScores:
        values: dict[str, Any] = {"predicted": None, "correct": None} | load_file(folder / ROWS_FILE)
        return RowScores(**values)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        """A folder in another's place; a reader never sees half of it."""
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
