"""The search: rungs of short runs of ``tune``; the best candidates of a rung continue in the next."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from ..base.figures import save_figure
from ..evaluation.profile import record_profile
from ..evaluation.scores import describe_scores
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.card import write_card
from ..tasks.examples import Examples
from ..tasks.task import Task
from ..tuning.settings import TuningSettings
from .budget import EVALUATIONS
from .candidate_run import CandidateRunner, score
from .figure import search_figure
from .preparation import PreparedSearch, prepare_search
from .result import FIGURE_FILE, Candidate, SearchResult, judge, promote
from .significance import compare_scores
from .study import LogRange, Memory
from .table import print_plan, print_result, status

DEFAULT_LENGTHS = (1, 2, 5, 10, 20, 50, 100)


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

    Writes to ``output``: ``<prompt>/`` (the recommended prompt, as :func:`tune` saves it), ``search.json``,
    ``search.svg``, ``trials/`` (every candidate's prompt and row scores after each rung) and ``study.jsonl``, an Optuna
    journal. The model holds the recommended prompt at the end.

    Args:
        model: plain prompts, or a :class:`DeepPromptModel`, without a prompt of the task's name.
        held_out_rows: the candidates are chosen by their scores on these rows. Early rungs may use a part of them.
        settings: the settings of all candidates; ``steps`` is the length of one full run (default 120).
        learning_rates: the rates to try with every length, or a range to draw from; None: the rate of the settings.
        budget: limit on the optimiser steps and on the estimated time of all candidates together, in full runs.
        test_rows: the recommended and the best prompt are scored on these rows at the end; the rows choose nothing and
            their cost is not part of the budget.
        resume: continue the search in ``output``; finished rungs are not repeated.
        changes: settings by name, such as ``steps=200``.

    Raises:
        ImportError: Optuna is not installed.
        FileExistsError: ``output`` already has a search, and ``resume`` was not given.
        FileNotFoundError: ``resume`` was given, but ``output`` holds no search.
        KeyboardInterrupt: at Ctrl-C; finished rungs are kept for ``resume``.
    """
    test_rows = list(test_rows)
    prepared = prepare_search(
        model,
        tokenizer,
        task,
        train_rows,
        held_out_rows,
        test_rows,
        Path(output),
        (settings or TuningSettings()).with_changes(changes),
        lengths=lengths,
        rates=learning_rates,
        budget=budget,
        console=console or Console(stderr=True),
    )
    direction = "maximize" if prepared.best_by == "accuracy" else "minimize"
    memory = Memory(prepared.output, prepared.facts, direction, resume)
    print_plan(prepared.plan, prepared.console)
    candidates = [
        Candidate(**values) for values in memory.ask(prepared.lengths, prepared.rates, prepared.settings.seed)
    ]
    before = _score_without_prompt(prepared, memory)
    finalists = _run_rungs(prepared, memory, candidates, CandidateRunner(prepared, memory, before.scores))
    return _finish(prepared, before, candidates, finalists, test_rows)


@dataclass(frozen=True)
class _Before:
    """The model without a prompt."""

    scores: dict[str, float]
    seconds: float
    """Time of scoring it."""


def _score_without_prompt(prepared: PreparedSearch, memory: Memory) -> _Before:
    stored = memory.recall(None, "before")
    if stored is None:
        with status(prepared.console, "scoring the model without a prompt"):
            start = time.perf_counter()
            bare = replace(prepared.task, special_tokens=True)
            scores = score(prepared, bare, prepared.held_out_rows, None).summary()
        stored = {"scores": scores, "seconds": time.perf_counter() - start}
        memory.store(None, "before", stored)
    prepared.console.print(f"without a prompt: {describe_scores(stored['scores'])}", highlight=False)
    return _Before(**stored)


def _run_rungs(
    prepared: PreparedSearch, memory: Memory, candidates: list[Candidate], runner: CandidateRunner
) -> list[Candidate]:
    """Trains and scores rung by rung; returns the candidates of the last rung."""
    alive, rungs = candidates, prepared.plan.rungs
    for number, rung in enumerate(rungs, 1):
        for candidate in alive:
            runner.run(candidate, number, rung)
        if number == len(rungs):
            break
        promoted = promote(alive, rungs[number].candidates, prepared.best_by)
        for candidate in alive:
            if candidate not in promoted:
                memory.end(candidate.number, pruned=True)
        alive = promoted
        shown = ", ".join(prepared.name(candidate) for candidate in alive)
        prepared.console.print(f"rung {number} done; continuing: {shown}", highlight=False)
    for candidate in alive:
        memory.end(candidate.number, pruned=False)
    return alive


def _finish(
    prepared: PreparedSearch,
    before: _Before,
    candidates: list[Candidate],
    finalists: list[Candidate],
    test_rows: Examples,
) -> SearchResult:
    """Saves the recommended prompt and the report, and loads the prompt into the model."""
    best, recommended = judge(finalists, prepared.best_by)
    assert best.rows is not None and recommended.rows is not None
    name, last = prepared.task.prompt, recommended.last
    _replace_folder(prepared.folder(recommended, len(recommended.rungs)) / name, prepared.output / name)
    result = SearchResult(
        folder=prepared.output / name,
        plan=prepared.plan,
        before=before.scores,
        candidates=candidates,
        best=best,
        recommended=recommended,
        comparison=None if best is recommended else compare_scores(recommended.rows, best.rows, prepared.best_by),
        best_by=prepared.best_by,
        test=_test_scores(prepared, recommended, best, test_rows),
        steps=sum(rung.steps for c in candidates for rung in c.rungs),
        seconds=before.seconds + sum(rung.seconds for c in candidates for rung in c.rungs),
        full_run_seconds=prepared.full_steps * last.training_seconds / last.steps
        + EVALUATIONS * last.scoring_seconds
        + before.seconds,
        rows_per_step=prepared.rows_per_step,
    )
    result.write(prepared.output)
    save_figure(search_figure(result), prepared.output / FIGURE_FILE)
    prepared.model.load_prompt(result.folder, name)
    record_profile(
        prepared.model,
        prepared.tokenizer,
        prepared.task,
        prepared.held_out_rows,
        result.folder,
        source="held-out rows of the search, which chose the prompt",
        batch_size=prepared.settings.batch_size,
    ).save(result.folder)
    write_card(result.folder)
    print_result(result, prepared.console)
    return result


def _test_scores(
    prepared: PreparedSearch, recommended: Candidate, best: Candidate, rows: Examples
) -> dict[str, dict[str, float]]:
    if not rows:
        return {}
    scores = {}
    for role, candidate in (("recommended", recommended), ("best", best)):
        values = prepared.model.read_prompt(prepared.folder(candidate, len(candidate.rungs)) / prepared.task.prompt)
        scores[role] = score(prepared, prepared.task, rows, values).summary()
    return scores


def _replace_folder(source: Path, target: Path) -> None:
    """Copies a folder to ``target``; readers see the old folder, no folder or the whole new one."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
