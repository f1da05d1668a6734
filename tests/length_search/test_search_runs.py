"""Whole searches: what they recommend and save, resumption, every kind of prompt, errors before any work."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import BAD, GOOD, reviews, tiny_tokenizer
from support.tiny_search import FAST, TASK, quiet, searched

import softprompt_fast as spf
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.length_search import candidate_run
from softprompt_fast.length_search.figure import search_figure
from softprompt_fast.length_search.result import SearchResult
from softprompt_fast.length_search.study import JOURNAL, LogRange, Memory
from softprompt_fast.length_search.table import verdict
from softprompt_fast.tasks.task import Task, generation_task
from softprompt_fast.tuning.run import tune


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
    assert "## Scores" in (tmp_path / "p" / "README.md").read_text()


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
    assert "which does not mean equal" in " ".join(verdict(found))


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


def test_rungs_continue_from_the_prompt_of_the_rung_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, torch.Tensor | None]] = []
    tune_tasks = candidate_run.tune_tasks

    def spy(model: Any, tokenizer: Any, jobs: Any, folder: Path, settings: Any, **options: Any) -> Any:
        values = model.prompts.snapshot("p") if "p" in model.prompts else None
        started.append((folder.parent.name + "/" + folder.name, values))
        return tune_tasks(model, tokenizer, jobs, folder, settings, **options)

    monkeypatch.setattr(candidate_run, "tune_tasks", spy)
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
def test_a_search_that_was_killed_continues_without_repeating_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, finished: Finished
) -> None:
    whole = finished.result
    steps: list[int] = []
    tune_tasks = candidate_run.tune_tasks

    def counted(model: Any, tokenizer: Any, jobs: Any, folder: Path, settings: Any, **options: Any) -> Any:
        if len(steps) == after:
            steps.append(0)
            tune_tasks(model, tokenizer, jobs, folder, settings, **options)
            raise Killed  # trained, but nothing of it noted
        steps.append(settings.steps)
        return tune_tasks(model, tokenizer, jobs, folder, settings, **options)

    monkeypatch.setattr(candidate_run, "tune_tasks", counted)
    model = spf.SoftPromptModel(build("llama"))
    with pytest.raises(Killed):
        searched(tmp_path / "half", model=model)
    assert "p" not in model.prompts and not (tmp_path / "half" / "search.json").exists()
    with pytest.raises(
        FileExistsError, match=r"study\.jsonl already exists; resume the search, or choose another output folder"
    ):
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
    changed = r"cannot resume: `lengths` was \[1, 2, 3, 4\] when the search started, got \[1, 2, 3, 5\]; choose another"
    with pytest.raises(ValueError, match=changed):
        searched(finished.folder, resume=True, lengths=[1, 2, 3, 5])
    with pytest.raises(ValueError, match=r"`held_out_rows` was '40 rows, .* when the search started, got '38 rows"):
        searched(finished.folder, resume=True, held_out=reviews(38))
    with pytest.raises(ValueError, match=r"`learning_rates` was .* when the search started"):
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
    assert "does not mean equal" in " ".join(verdict(found)) or found.comparison is None
    search_figure(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "`lengths` must be one or more positive integers"),
        ({"lengths": [2, 0]}, "`lengths` must be one or more positive integers"),
        ({"lengths": [2, 2]}, "`lengths` must be different"),
        ({"lengths": [2, 125]}, "`lengths` must leave room for texts of 9 tokens in the model's context of 128: 119"),
        ({"learning_rates": [0.0]}, "`learning_rates` must be one or more positive"),
        ({"num_virtual_tokens": 3}, "`num_virtual_tokens` must be None in a search because `lengths` sets it, got 3"),
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
    with pytest.raises(ValueError, match="the model already has a prompt 'p'; remove it"):
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
