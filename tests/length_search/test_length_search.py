"""The search for a prompt length: its budget, its statistics, what it finds, going on after an interruption."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.tiny_models import build
from support.tiny_reviews import BAD, GOOD, reviews, run, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.cli.app import app, console, main
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.evaluation.scoring import RowScores
from softprompt_fast.evaluation.statistics import mcnemar_of_counts
from softprompt_fast.length_search import run as search_module
from softprompt_fast.length_search.budget import LEAST_STEPS, Costs, make_plan, rung_sizes
from softprompt_fast.length_search.figure import search_figure
from softprompt_fast.length_search.result import Candidate, RungResult, SearchResult, judge, promote
from softprompt_fast.length_search.run import search
from softprompt_fast.length_search.significance import compare
from softprompt_fast.length_search.study import JOURNAL, LogRange, Memory
from softprompt_fast.length_search.table import verdict
from softprompt_fast.tasks.task import Task, classification_task, generation_task
from softprompt_fast.tuning.run import tune

TASK = classification_task(reviews(), prompt="p")
FAST: dict[str, Any] = {"steps": 40, "batch_size": 8, "learning_rate": 0.1, "lengths": [1, 2, 3, 4]}


def quiet() -> Console:
    return Console(quiet=True)


def searched(output: Path, task: Task = TASK, **options: Any) -> SearchResult:
    model = options.pop("model", None) or spf.SoftPromptModel(build("llama"))
    rows, held_out = options.pop("rows", None) or reviews(64), options.pop("held_out", None) or reviews(40)
    return search(model, tiny_tokenizer(), task, rows, held_out, output, **(FAST | {"console": quiet()} | options))


# --- the budget ---

COSTS = Costs(text_per_step=960, prompts_per_step=1, text_per_row=30, prompts_per_row=1 / 32, rows=400)


def test_costs_of_a_step_and_of_a_full_run() -> None:
    assert COSTS.step(20) == 2 * (960 + 20)
    assert COSTS.scoring(64, 100) == 100 * (30 + 2)
    assert COSTS.full_run(120, 20) == 120 * 1960 + 5 * 400 * (30 + 20 / 32) + 400 * 30


def test_the_default_plan_halves_seven_lengths_within_two_full_runs() -> None:
    plan = make_plan(COSTS, [1, 2, 5, 10, 20, 50, 100], 120, 20, 2.0)
    assert [rung.candidates for rung in plan.rungs] == [7, 3, 2]
    assert plan.most_steps == sum(rung.candidates * rung.steps for rung in plan.rungs)
    assert 0.85 * 240 <= plan.most_steps <= 0.95 * 240 and 0.85 <= plan.cost / 2 <= 0.95
    assert plan.rungs[-1].rows == 400 and plan.rungs[-1].total_steps == sum(rung.steps for rung in plan.rungs)
    assert rung_sizes(1, 2.0) == [1] and rung_sizes(3, 3.5) == [3] and rung_sizes(30, 1.0) == [30, 10, 4, 2]


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    steps=st.integers(1, 2000),
    budget=st.floats(0.2, 12.0),
    text=st.floats(1, 20_000),
    rows=st.integers(2, 20_000),
    prompts=st.sampled_from([0.0, 1.0, 32.0]),
    data=st.data(),
)
def test_no_search_exceeds_its_budget_whichever_candidates_go_on(
    lengths: list[int], steps: int, budget: float, text: float, rows: int, prompts: float, data: Any
) -> None:
    costs = Costs(text, prompts, text / 32, prompts / 32, rows)
    full_length = data.draw(st.sampled_from(lengths))
    try:
        plan = make_plan(costs, lengths, steps, full_length, budget)
    except ValueError as error:
        assert "are the least that tell anything" in str(error)
        return
    alive, spent, cost, level = list(lengths), 0, costs.scoring(0, rows), 0
    for rung in plan.rungs:
        alive = data.draw(st.permutations(alive))[: rung.candidates]
        assert rung.steps >= min(LEAST_STEPS, steps - level) and 1 <= rung.rows <= rows
        spent += rung.steps * len(alive)
        cost += sum(rung.steps * costs.step(length) + costs.scoring(length, rung.rows) for length in alive)
        level += rung.steps
        assert level == rung.total_steps <= steps
    assert rung.rows == rows
    most = 0.95 * budget  # the rest is laid aside
    assert spent == plan.most_steps <= most * steps
    assert cost <= most * costs.full_run(steps, full_length) * (1 + 1e-9)
    assert plan.cost <= most * (1 + 1e-9)


def test_a_budget_that_is_too_small_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"`budget` of 2 full runs of 20 steps leaves \d steps for each of 7 cand"):
        make_plan(COSTS, [1, 2, 5, 10, 20, 50, 100], 20, 20, 2.0)
    with pytest.raises(ValueError, match="`budget` must be a positive number of full runs, got nan"):
        make_plan(COSTS, [1], 20, 1, math.nan)


# --- statistics ---


def scores_of(correct: list[bool]) -> RowScores:
    hits = torch.tensor(correct)
    return RowScores((~hits).double() + 0.1, torch.ones(len(hits), dtype=torch.float64), hits.long(), hits)


def losses_of(losses: list[float], weights: list[float] | None = None) -> RowScores:
    counted = torch.ones(len(losses)) if weights is None else torch.tensor(weights)
    return RowScores(torch.tensor(losses, dtype=torch.float64), counted.double(), None, None)


def test_mcnemar_against_values_computed_by_hand() -> None:
    # 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10 and so on
    assert mcnemar_of_counts(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_of_counts(2, 8) == mcnemar_of_counts(8, 2)
    assert mcnemar_of_counts(6, 0) == pytest.approx(2 / 64) and mcnemar_of_counts(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_of_counts(3, 3) == mcnemar_of_counts(0, 0) == 1.0


def test_prompts_are_compared_row_by_row() -> None:
    reference = scores_of([True] * 30 + [False] * 10)
    worse = compare(scores_of([False] * 6 + [True] * 24 + [False] * 10), reference, "accuracy")
    assert (worse.worse_by, worse.p_value, worse.rows) == (0.15, pytest.approx(2 / 64), 40)
    assert worse.significantly_worse and worse.low is not None and worse.high is not None
    # Agresti and Min: (6 - 0) / 42 +- 1.96 * sqrt(6 + 1 - 36 / 42) / 42
    half = 1.959964 * math.sqrt(7 - 36 / 42) / 42
    assert (worse.low, worse.high) == (pytest.approx(6 / 42 - half), pytest.approx(6 / 42 + half))
    # As much accuracy lost in all, but the rows disagree both ways: no longer significant.
    mixed = compare(scores_of([False] * 12 + [True] * 18 + [True] * 6 + [False] * 4), reference, "accuracy")
    assert mixed.worse_by == 0.15 and mixed.p_value > 0.05 and not mixed.significantly_worse
    better = compare(scores_of([True] * 40), reference, "accuracy")
    assert better.worse_by == -0.25 and better.p_value < 0.05 and not better.significantly_worse
    with pytest.raises(ValueError, match="`scores` must be of the reference's 40 rows, got 2 rows"):
        compare(scores_of([True, False]), reference, "accuracy")


def test_losses_are_compared_by_a_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    a, b = [1.0, 2.5, 0.7, 4.0, 3.0], [0.8, 2.0, 0.9, 3.1, 2.2]
    found, expected = compare(losses_of(a), losses_of(b), "loss"), ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert found.p_value == pytest.approx(float(expected.pvalue)) and found.worse_by == pytest.approx(0.44)
    assert (found.low, found.high) == (pytest.approx(float(interval.low)), pytest.approx(float(interval.high)))
    weighted = compare(losses_of([4.0, 9.0], [2.0, 3.0]), losses_of([2.0, 6.0], [2.0, 3.0]), "loss")
    assert (weighted.worse_by, weighted.p_value) == (1.0, 0.0)  # one more per token in every row
    assert compare(losses_of([1.0]), losses_of([0.5]), "loss").low is None
    same = compare(losses_of(a), losses_of(a), "loss")
    assert (same.worse_by, same.p_value, same.significantly_worse) == (0.0, 1.0, False)


def candidate(number: int, length: int, correct: list[bool]) -> Candidate:
    rows = scores_of(correct)
    return Candidate(number, length, 0.1, [RungResult(1, 5, 5, rows.summary(), 1.0, 1.0, 2.0)], rows)


def hits(count: int) -> list[bool]:
    return [True] * count + [False] * (40 - count)


def test_the_best_go_on_and_the_shortest_that_is_not_significantly_worse() -> None:
    bad, short, middle, good, best = (
        candidate(i, length, hits(n)) for i, (length, n) in enumerate([(1, 20), (2, 32), (5, 33), (10, 34), (20, 35)])
    )
    alive = [bad, short, middle, good, best]
    assert judge(alive, "accuracy") == (best, short)
    assert promote(alive, 3, "accuracy") == [short, good, best] and promote(alive, 2, "accuracy") == [short, best]
    assert bad.last.against_best is not None and bad.last.against_best["significantly_worse"]
    assert bad.last.against_best["worse_by"] == pytest.approx(15 / 40) and best.last.against_best is None
    alone = [bad, candidate(7, 2, hits(35)), candidate(8, 9, hits(34)), candidate(9, 20, hits(33))]
    assert promote(alone, 2, "accuracy") == alone[1:3] and promote(alone, 3, "accuracy") == alone[1:]
    equal = [candidate(0, 9, hits(30)), candidate(1, 3, hits(30))]
    assert judge(equal, "loss") == (equal[1], equal[1])


# --- searches ---


@dataclass
class Finished:
    folder: Path
    model: spf.SoftPromptModel
    result: SearchResult


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("search")
    model = spf.SoftPromptModel(build("llama"))
    return Finished(folder, model, searched(folder, model=model, test_rows=reviews(12)))


def test_a_search_keeps_to_its_plan_and_saves_what_it_recommends(finished: Finished) -> None:
    tmp_path, model, found = finished.folder, finished.model, finished.result
    report = json.loads((tmp_path / "search.json").read_text())
    assert report["steps"] == found.steps <= 2 * 40 and report["plan"]["budget"] == 2.0
    assert [c["num_virtual_tokens"] for c in report["candidates"]] == [1, 2, 3, 4]
    assert sum(rung["steps"] for c in report["candidates"] for rung in c["rungs"]) == found.steps
    assert found.best.last.scores["accuracy"] >= 0.9 > found.before["accuracy"]
    assert found.recommended.num_virtual_tokens <= found.best.num_virtual_tokens
    # What is saved is what was scored.
    saved = spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path, ["p"])
    assert len(saved.prompts["p"]) == found.recommended.num_virtual_tokens
    assert torch.equal(saved.prompts["p"], model.prompts["p"]) and found.folder == tmp_path / "p"
    assert Task.load(tmp_path / "p") == TASK
    scores = evaluate(saved, tiny_tokenizer(), TASK, reviews(40))
    assert scores["accuracy"] == found.recommended.last.scores["accuracy"] == found.recommended.rows.accuracy  # type: ignore[union-attr]
    assert scores["loss"] == pytest.approx(found.recommended.last.scores["loss"], abs=1e-5)
    assert (
        found.before["accuracy"]
        == evaluate(spf.SoftPromptModel(build("llama")), tiny_tokenizer(), TASK, reviews(40))["accuracy"]
    )
    assert found.test["recommended"] == pytest.approx(
        {k: v for k, v in evaluate(saved, tiny_tokenizer(), TASK, reviews(12)).items() if k in found.test["best"]}
        | {k: found.test["recommended"][k] for k in ("loss_low", "loss_high")},
        abs=1e-5,
    )
    assert "<svg" in (tmp_path / "search.svg").read_text()


def two_words() -> list[dict[str, Any]]:
    """Texts whose label hangs on the first word and the last: too much for a single vector."""
    rows = []
    for word, count, start in itertools.product(GOOD + BAD, range(4), ["film", "plot", "film plot", "plot film"]):
        label = "yes" if (word in GOOD) != start.startswith("plot") else "no"
        rows.append({"text": f"{start} {'very ' * count}{word}", "label": label})
    return rows * 3


def test_a_length_that_fails_is_not_recommended_and_one_that_is_hardly_worse_is(tmp_path: Path) -> None:
    options = {"batch_size": 16, "init": "random", "rows": two_words(), "held_out": two_words()}
    found = searched(tmp_path / "two", lengths=[1, 4], steps=300, learning_rate=0.03, **options)
    assert found.recommended is found.best and found.best.num_virtual_tokens == 4
    failed = found.candidates[0].last.against_best
    assert failed is not None and failed["significantly_worse"] and failed["low"] > 0
    assert found.steps == 2 * found.plan.rungs[0].steps > 100  # two lengths fit the budget almost in full
    found = searched(tmp_path / "one", lengths=[1, 2], steps=100)
    assert found.recommended.num_virtual_tokens == 1 and found.best.num_virtual_tokens == 2
    assert found.comparison is not None and 0 < found.comparison.worse_by < 0.1 < found.comparison.p_value
    assert "which is not to say equal" in " ".join(verdict(found))


def test_the_best_is_within_a_point_of_an_exhaustive_sweep(tmp_path: Path) -> None:
    lengths = [1, 2, 4, 8]
    found = searched(tmp_path / "search", lengths=lengths, steps=60)
    sweep = {}
    for length in lengths:
        model = spf.SoftPromptModel(build("llama"))
        options = {name: value for name, value in FAST.items() if name != "lengths"}
        options |= {"steps": 60, "num_virtual_tokens": length, "console": quiet()}
        sweep[length] = tune(
            model, tiny_tokenizer(), TASK, reviews(64), reviews(40), tmp_path / str(length), **options
        ).after["accuracy"]
    assert sweep[found.best.num_virtual_tokens] >= max(sweep.values()) - 0.01


def test_the_figure_shows_every_candidate_of_every_rung(finished: Finished) -> None:
    found = finished.result
    left, right = search_figure(found).axes
    drawn = list(left.containers)
    assert len(drawn) == len(found.plan.rungs)
    for number, container in enumerate(drawn, 1):
        reached = [c.rungs[number - 1] for c in found.candidates if len(c.rungs) >= number]
        assert list(container[0].get_ydata()) == [rung.scores["accuracy"] for rung in reached]
        ends = [(low, high) for (_, low), (_, high) in container[2][0].get_segments()]
        assert ends == [pytest.approx((r.scores["accuracy_low"], r.scores["accuracy_high"])) for r in reached]
    assert all(list(line.get_xdata()) == [1, 2, 3, 4] and min(line.get_ydata()) > 0 for line in right.lines)


def test_rungs_go_on_from_the_prompt_of_the_rung_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, torch.Tensor | None]] = []
    tune_tasks = search_module.tune_tasks

    def spy(model: Any, tokenizer: Any, jobs: Any, folder: Path, settings: Any, **options: Any) -> Any:
        values = model.prompts.values("p") if "p" in model.prompts else None
        started.append((folder.parent.name + "/" + folder.name, values))
        return tune_tasks(model, tokenizer, jobs, folder, settings, **options)

    monkeypatch.setattr(search_module, "tune_tasks", spy)
    found = searched(tmp_path)
    assert len(started) == sum(len(c.rungs) for c in found.candidates) > 4
    for name, values in started:
        trial, rung = name.split("/")
        if rung == "rung-1":
            assert values is None
        else:
            before = tmp_path / "trials" / trial / f"rung-{int(rung[5:]) - 1}"
            saved = spf.SoftPromptModel.from_pretrained(build("llama"), before, ["p"])
            assert torch.equal(values, saved.prompts["p"])  # type: ignore[arg-type]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_search_that_was_killed_goes_on_without_repeating_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, finished: Finished
) -> None:
    whole = finished.result
    steps: list[int] = []
    tune_tasks = search_module.tune_tasks

    def counted(model: Any, tokenizer: Any, jobs: Any, folder: Path, settings: Any, **options: Any) -> Any:
        if len(steps) == after:
            steps.append(0)
            tune_tasks(model, tokenizer, jobs, folder, settings, **options)
            raise Killed  # trained, but nothing of it noted
        steps.append(settings.steps)
        return tune_tasks(model, tokenizer, jobs, folder, settings, **options)

    monkeypatch.setattr(search_module, "tune_tasks", counted)
    model = spf.SoftPromptModel(build("llama"))
    with pytest.raises(Killed):
        searched(tmp_path / "half", model=model)
    assert "p" not in model.prompts and not (tmp_path / "half" / "search.json").exists()
    with pytest.raises(FileExistsError, match="already holds a search; resume it"):
        searched(tmp_path / "half")
    found = searched(tmp_path / "half", model=model, resume=True)
    assert sum(steps) == found.steps == whole.steps
    for a, b in zip(whole.candidates, found.candidates, strict=True):
        assert [rung.scores for rung in a.rungs] == [rung.scores for rung in b.rungs]
    assert found.recommended.number == whole.recommended.number
    for folder in (finished.folder, tmp_path / "half"):
        saved = spf.SoftPromptModel.from_pretrained(build("llama"), folder, ["p"])
        assert torch.equal(saved.prompts["p"], model.prompts["p"])
    # Once it is done, resuming only reads.
    model.remove_prompt("p")
    again = searched(tmp_path / "half", model=model, resume=True)
    assert sum(steps) == whole.steps and again.to_json() == found.to_json()


def test_what_changed_since_a_search_began_is_named(tmp_path: Path, finished: Finished) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        searched(tmp_path, resume=True)
    began = r"`lengths` must be as when the search in .* began, \[1, 2, 3, 4\], got \[1, 2, 3, 5\]"
    with pytest.raises(ValueError, match=began):
        searched(finished.folder, resume=True, lengths=[1, 2, 3, 5])
    with pytest.raises(ValueError, match="`held_out_rows` must be as when the search"):
        searched(finished.folder, resume=True, held_out=reviews(38))
    with pytest.raises(ValueError, match="`learning_rates` must be as when"):
        searched(finished.folder, resume=True, learning_rate=0.2)


def test_optuna_reads_the_study(tmp_path: Path) -> None:
    import optuna

    found = searched(tmp_path, learning_rates=[0.3, 1e-5], lengths=[1, 2], steps=40)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL)))
    study = optuna.load_study(study_name="search", storage=storage)
    assert {(t.params["num_virtual_tokens"], t.params["learning_rate"]) for t in study.trials} == {
        (length, rate) for length in (1, 2) for rate in (0.3, 1e-5)
    }
    for candidate in found.candidates:
        trial = study.trials[candidate.number]
        assert trial.intermediate_values == {rung.total_steps: rung.scores["loss"] for rung in candidate.rungs}
        finished = len(candidate.rungs) == len(found.plan.rungs)
        assert trial.state.name == ("COMPLETE" if finished else "PRUNED")
    assert found.recommended.learning_rate == 0.3  # the other one learns nothing
    assert "--learning-rate 0.3 --steps 40" in found.options()


def test_learning_rates_drawn_from_a_range_are_the_same_after_a_kill(tmp_path: Path) -> None:
    def drawn(folder: str, *, kills: int = 0) -> list[dict[str, Any]]:
        for resume in [False] + [True] * kills:
            memory = Memory(tmp_path / folder, {"a": 1}, "maximize", resume)
            if resume is False and kills:
                memory.study.enqueue_trial({"num_virtual_tokens": 1})  # killed before it was asked for
                continue
            found = memory.ask([1, 20], LogRange(1e-3, 1e-1, 3), seed=5)
        return found

    found = drawn("whole")
    rates = [values["learning_rate"] for values in found]
    assert len(set(rates)) == 6 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert [values["num_virtual_tokens"] for values in found] == [1] * 3 + [20] * 3
    assert drawn("killed", kills=2) == found


@pytest.mark.parametrize("kind", ["generation", "deep", "t5", "after_bos", "forms"])
def test_every_kind_of_prompt_and_task_can_be_searched(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"lengths": [1, 2, 4], "steps": 30}
    task, model = TASK, spf.SoftPromptModel(build("t5" if kind == "t5" else "llama"))
    if kind == "generation":
        task = generation_task(input_column="text", output_column="label", prompt="p")
    elif kind == "deep":
        model = spf.DeepPromptModel(build("llama"))
    elif kind == "after_bos":
        options |= {"placement": "after_bos"}
    elif kind == "forms":
        options |= {"reparameterization": "residual", "prompt_dropout": 0.1, "objective": "vocabulary"}
        options |= {"learning_rate": 0.03, "steps": 90}
    found = searched(tmp_path, task, model=model, **options)
    chosen = found.recommended
    assert chosen.last.scores["loss"] < found.before["loss"]
    assert len(model.prompts["p"]) == chosen.num_virtual_tokens + (kind == "after_bos")
    own = Task.load(tmp_path / "p")
    scores = evaluate(model, tiny_tokenizer(), own, reviews(40))
    assert scores["loss"] == pytest.approx(chosen.last.scores["loss"], abs=1e-4)
    assert len(predict(model, tiny_tokenizer(), own, reviews(2))) == 2
    assert "not to say equal" in " ".join(verdict(found)) or found.comparison is None
    search_figure(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "`lengths` must be one or more positive integers"),
        ({"lengths": [2, 0]}, "`lengths` must be one or more positive integers"),
        ({"lengths": [2, 2]}, "`lengths` must be different"),
        ({"lengths": [2, 125]}, "`lengths` must leave room for texts of 9 tokens in the model's context of 128: 119"),
        ({"learning_rates": [0.0]}, "`learning_rates` must be one or more positive"),
        ({"num_virtual_tokens": 3}, "`num_virtual_tokens` must be None in a search, for `lengths` say it"),
        ({"eval_every": 3}, "`eval_every` must be None in a search"),
        ({"token_update_rank": 2}, "`token_update_rank` must be None in a search"),
        ({"epochs": 1.0, "steps": None}, "`epochs` must be None in a search"),
        ({"init": torch.ones(2, 32)}, r"`init` must be one of .* got tensor \[2, 32\]"),
        ({"held_out": reviews(1)}, "`held_out_rows` must hold at least 2 rows, got 1"),
        ({"test_rows": [{"text": "film", "label": "maybe"}]}, "label 'maybe' is not among the task's labels"),
        ({"budget": 0.1}, "`budget` of 0.1 full runs"),
        ({"reparameterization": "low-rank"}, "`rank` must be 1 at most, the shortest of `lengths`, got 8"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searched(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_the_prompt_already_is_refused(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    model.add_prompt("p", init=torch.ones(2, 32))
    with pytest.raises(ValueError, match="`model` must not have a prompt 'p' yet"):
        searched(tmp_path, model=model)


def test_other_prompts_of_the_model_are_left_alone(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    other = model.add_prompt("other", init=torch.randn(3, 32))
    before = other.detach().clone()
    searched(tmp_path, model=model, lengths=[1, 2])
    assert torch.equal(model.prompts["other"], before) and model.prompts["other"].requires_grad
    assert set(model.prompts) == {"other", "p"} and not (tmp_path / "other").exists()


def test_without_optuna_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"a search needs Optuna: pip install \"softprompt_fast\[search\]\""):
        searched(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command line ---


@pytest.fixture
def command(tmp_path: Path, model_folder: Path) -> list[str]:
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(80)))
    start = ["search", "-m", str(model_folder), "-d", str(data), "--held-out", "30", "--dtype", "float32"]
    return [*start, "-o", str(tmp_path / "out"), "--steps", "24", "-b", "8", "--lr", "0.3"]


def test_search_command(command: list[str], tmp_path: Path) -> None:
    data = command[4]
    shown = run(*command, "--lengths", "1,2,4", "--test", data, "--name", "mine").output
    report = json.loads((tmp_path / "out" / "search.json").read_text())
    assert report["test"]["recommended"]["rows"] == 80 and report["steps"] <= 48
    assert "Plan" in shown and "Candidates" in shown and "recommended: " in shown
    assert f"softprompt-fast predict --prompt {tmp_path / 'out' / 'mine'}" in shown.replace("\n", "")
    scores = json.loads(run("evaluate", "-p", str(tmp_path / "out" / "mine"), "-d", data, "--dtype", "float32").stdout)
    assert scores["accuracy"] == report["test"]["recommended"]["accuracy"]
    run(*command, "--lengths", "1,2,4", "--test", data, "--name", "mine", "--resume")
    again = json.loads((tmp_path / "out" / "search.json").read_text())
    assert again == report


def test_an_interrupted_command_can_be_resumed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    calls: list[int] = []
    tune_tasks = search_module.tune_tasks

    def interrupted(*arguments: Any, **options: Any) -> Any:
        results = tune_tasks(*arguments, **options)
        calls.append(results[0].steps)
        if len(calls) == 2:
            results[0].interrupted = True  # as after Ctrl-C
        return results

    monkeypatch.setattr(search_module, "tune_tasks", interrupted)
    arguments = [*command, "--lengths", "1,2,4"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 130 and "--resume" in result.output
    run(*arguments, "--resume")
    report = json.loads((tmp_path / "out" / "search.json").read_text())
    assert sum(calls) == report["steps"] + calls[1]  # the interrupted one is done again, the first is not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1,two"], "--lengths must be numbers with commas between them, got '1,two'"),
        (["--learning-rates", "0.1:0.01"], r"--learning-rates must be like 1e-3,1e-2 or LOW:HIGH\[:DRAWS\]"),
        (["--learning-rates", "0.1:1:2:3"], "--learning-rates must be like"),
        (["--budget", "0"], "`budget` must be a positive number of full runs"),
        (["--steps", "3"], "leaves 0 steps for each of 7 candidates"),
        (["--init", "nonsense"], "`init` must be one of"),
        (["--resume", "--lengths", "1,2"], "nothing to resume"),
    ],
)
def test_mistakes_are_one_line(
    command: list[str], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["softprompt-fast", *command, *options])
    shown: list[str] = []
    monkeypatch.setattr(console, "print", lambda *text, **_: shown.append(" ".join(map(str, text))))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert re.search(message, "\n".join(shown)), shown
