"""Several prompts in one run: one per task, a part they share, ensembles; from Python and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import build
from support.tiny_reviews import reviews, run, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import softprompt_fast as spf
from softprompt_fast.evaluation.ensembles import evaluate_ensemble
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.ensemble import tune_ensemble
from softprompt_fast.tuning.job import TuningJob
from softprompt_fast.tuning.run import tune, tune_tasks

COMMON: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.1, "num_virtual_tokens": 4}


def turned(count: int = 64) -> list[dict[str, Any]]:
    """The same texts with the labels turned round: no one prompt answers both."""
    return [row | {"label": {"yes": "no", "no": "yes"}[row["label"]]} for row in reviews(count)]


def the_jobs() -> list[TuningJob]:
    return [
        TuningJob(classification_task(reviews(), prompt="right"), reviews(), reviews(24)),
        TuningJob(classification_task(reviews(), prompt="turned"), turned(20), turned(24)),
    ]


def test_opposite_tasks_are_learnt_in_one_run(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    frozen = model.add_prompt("bystander", init=torch.randn(2, 32))
    kept = frozen.detach().clone()
    results = tune_tasks(model, tiny_tokenizer(), the_jobs(), tmp_path, steps=60, **COMMON)
    assert [r.after["accuracy"] >= 0.9 for r in results] == [True, True]
    assert torch.equal(model.prompts["bystander"].detach(), kept) and model.prompts["bystander"].requires_grad
    again = spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path)
    for name, rows in (("right", reviews(24)), ("turned", turned(24))):
        assert evaluate(again, tiny_tokenizer(), Task.load(tmp_path / name), rows)["accuracy"] >= 0.9
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["prompts"]) == {"right", "turned"}


def test_each_task_counts_alike_whatever_its_rows(tmp_path: Path) -> None:
    """A step's gradient of each prompt is that of its own rows, so a run of one task goes the same way."""
    jobs = the_jobs()
    for job in jobs:
        job.train_rows = job.train_rows[:16]  # all in each step, so that their order does not matter
    both = spf.SoftPromptModel(build("llama"))
    tune_tasks(both, tiny_tokenizer(), jobs, tmp_path / "both", steps=3, max_grad_norm=1e9, **COMMON)
    alone = spf.SoftPromptModel(build("llama"))
    job = the_jobs()[0]
    tune(
        alone,
        tiny_tokenizer(),
        job.task,
        reviews()[:16],
        job.held_out_rows,
        tmp_path / "alone",
        steps=3,
        max_grad_norm=1e9,
        **COMMON,
    )
    # Adam divides by the gradient's size, so half of it (the mean is over twice the rows) moves a prompt as far.
    assert torch.allclose(both.prompts.snapshot("right"), alone.prompts.snapshot("right"), atol=1e-3)


def test_prompts_of_several_tasks_can_share_a_part(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    results = tune_tasks(model, tiny_tokenizer(), the_jobs(), tmp_path, shared_tokens=3, steps=60, **COMMON)
    right, other = model.prompts.snapshot("right"), model.prompts.snapshot("turned")
    assert model.prompts.lengths == {"right": 7, "turned": 7} and "shared" not in model.prompts
    assert not torch.allclose(right[3:], other[3:], atol=1e-2)
    assert all(result.after["accuracy"] >= 0.9 for result in results)
    same_step = results[0].best_step == results[1].best_step
    assert torch.allclose(right[:3], other[:3]) == same_step  # each prompt keeps its own best state


def test_a_shared_part_learns_from_all_tasks(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    tune_tasks(model, tiny_tokenizer(), the_jobs(), tmp_path, shared_tokens=3, steps=2, eval_every=2, **COMMON)
    right, other = model.prompts.snapshot("right"), model.prompts.snapshot("turned")
    start = spf.SoftPromptModel(build("llama"))
    tune(start, tiny_tokenizer(), the_jobs()[0].task, reviews(), reviews(4), tmp_path / "start", steps=1, eval_every=1,
         batch_size=4, learning_rate=1e-12, num_virtual_tokens=3)  # fmt: skip
    assert torch.equal(right[:3], other[:3])
    assert not torch.allclose(right[:3], start.prompts.snapshot("right"), atol=1e-2)


def test_an_interrupted_run_of_several_goes_on(tmp_path: Path) -> None:
    def tuned(**options: Any) -> dict[str, torch.Tensor]:
        model = spf.SoftPromptModel(build("llama"))
        options = COMMON | {"eval_every": 4, "prompt_dropout": 0.1, "reparameterization": "residual"} | options
        tune_tasks(model, tiny_tokenizer(), the_jobs(), tmp_path, steps=8, shared_tokens=2, **options)
        return load_file(last / "bank.safetensors")

    last = tmp_path / "checkpoints" / "checkpoint-8"
    whole = tuned()
    shutil.rmtree(last)
    again = tuned(resume=True)
    assert whole.keys() == again.keys() and len(whole) > 10
    assert all(torch.allclose(whole[name], again[name], atol=1e-5) for name in whole)


def test_jobs_need_names_of_their_own(tmp_path: Path) -> None:
    jobs = the_jobs()
    jobs[1].task.prompt = "right"
    with pytest.raises(ValueError, match="`jobs` must be one or more with prompts of different names"):
        tune_tasks(spf.SoftPromptModel(build("llama")), tiny_tokenizer(), jobs, tmp_path)


# --- ensembles ---


def test_an_ensemble_is_tuned_in_one_run_and_decides_together(tmp_path: Path) -> None:
    model, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    task = classification_task(reviews(), prompt="p")
    result = tune_ensemble(
        model, tokenizer, task, reviews(), reviews(24), tmp_path, members=3, init="vocabulary", steps=40, **COMMON
    )
    values = [model.prompts.snapshot(f"p-{i}") for i in range(3)]
    assert not torch.allclose(values[0], values[1], atol=0.1) and not torch.allclose(values[1], values[2], atol=0.1)
    assert all(member.after["loss"] < member.before["loss"] for member in result.members)
    each = [predict(model, tokenizer, task, reviews(24), prompt=f"p-{i}") for i in range(3)]
    right = 0
    for i, row in enumerate(reviews(24)):
        mean = {label: sum(one[i]["scores"][label] for one in each) for label in ("yes", "no")}
        right += max(mean, key=mean.__getitem__) == row["label"]
    assert result.scores["accuracy"] == right / 24
    facts = json.loads(result.file.read_text())
    assert facts["members"] == ["p-0", "p-1", "p-2"] and facts["scores"] == result.scores


def test_members_behind_bos_are_scored_as_they_are_read(tmp_path: Path) -> None:
    model, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    task = classification_task(reviews(), prompt="p")
    options: dict[str, Any] = COMMON | {"placement": "after_bos", "steps": 4, "members": 2}
    found = tune_ensemble(model, tokenizer, task, reviews(), reviews(24), tmp_path, **options)
    own = Task.load(found.members[0].folder)
    names = ["p-0", "p-1"]
    assert evaluate_ensemble(model, tokenizer, own, reviews(24), names) == found.scores
    assert evaluate_ensemble(model, tokenizer, task, reviews(24), names)["loss"] != found.scores["loss"]


def test_members_may_start_from_text_and_otherwise(tmp_path: Path) -> None:
    model, task = spf.SoftPromptModel(build("llama")), classification_task(reviews(), prompt="p")
    options: dict[str, Any] = COMMON | {"init": "text", "init_text": "film plot", "steps": 1, "learning_rate": 1e-12}
    tune_ensemble(
        model, tiny_tokenizer(), task, reviews(), reviews(8), tmp_path, members=["text", "class_labels"], **options
    )
    table = model.get_input_embeddings().weight
    for name, words in (("p-0", "film plot"), ("p-1", "no yes")):
        ids = tiny_tokenizer()(words, add_special_tokens=False).input_ids
        assert torch.allclose(model.prompts.snapshot(name)[:2], table[ids], atol=1e-6)


def test_a_majority_outvotes_a_wrong_member() -> None:
    model, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    task = classification_task(reviews(), prompt="p")
    for i in range(5):
        model.add_prompt(f"m{i}", init=torch.randn(3, 32))
    rows = reviews(24)
    each = [predict(model, tokenizer, task, rows, prompt=f"m{i}") for i in range(5)]
    right = sum(sum(one[i]["prediction"] == row["label"] for one in each) >= 3 for i, row in enumerate(rows))
    scores = evaluate_ensemble(model, tokenizer, task, rows, [f"m{i}" for i in range(5)], combine="majority")
    assert scores["accuracy"] == right / 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 1}, "`members` must be at least 2, got 1"),
        ({"combine": "vote"}, "`combine` must be one of"),
    ],
)
def test_bad_ensembles_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    task = classification_task(reviews(), prompt="p")
    with pytest.raises(ValueError, match=message):
        tune_ensemble(
            spf.SoftPromptModel(build("llama")), tiny_tokenizer(), task, reviews(), reviews(4), tmp_path, **options
        )


# --- the command line ---


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TRAIN = ("-b", "16", "-P", "4", "--lr", "0.1", "--dtype", "float32")


def test_several_tasks_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    rows = [row | {"kind": "right"} for row in reviews()] + [row | {"kind": "turned"} for row in turned()]
    data, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    common = ("-m", str(model_folder), "-d", str(data), "-o", str(output), "--steps", "60", *TRAIN)
    run("train", *common, "--task-column", "kind", "--shared-tokens", "2", "--held-out", "16")
    found = tmp_path / "found.jsonl"
    command = ("-p", str(output), "-d", str(data), "--prompt-name-column", "kind", "-o", str(found))
    run("predict", *command, "--dtype", "float32")
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert sum(a["prediction"] == a["label"] for a in answers) / len(answers) >= 0.9


def test_an_ensemble_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "rows.jsonl", reviews()), tmp_path / "run"
    common = ("-m", str(model_folder), "-d", str(data), "-o", str(output), "--steps", "40", *TRAIN)
    run("train", *common, "--member-init", "vocabulary", "--member-init", "random", "--held-out", "16")
    assert json.loads((output / "ensemble.json").read_text())["members"] == ["prompt-0", "prompt-1"]
    found = tmp_path / "found.jsonl"
    run("predict", "-p", str(output), "-d", str(data), "-o", str(found), "--ensemble", "--dtype", "float32")
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert all("agreement" in a for a in answers)
    assert sum(a["prediction"] == a["label"] for a in answers) / len(answers) >= 0.9


def test_deep_prompts_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "rows.jsonl", reviews()), tmp_path / "run"
    run("train", "-m", str(model_folder), "-d", str(data), "-o", str(output), "--steps", "40", *TRAIN, "--deep",
        "--init", "vocabulary", "--reparameterization", "residual", "--held-out", "16")  # fmt: skip
    config = json.loads((output / "prompt" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    scores = json.loads(run("evaluate", "-p", str(output), "-d", str(data), "--dtype", "float32").stdout)
    assert scores["accuracy"] >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task-column", "kind"), "no column 'kind' in the data"),
        (("--shared-tokens", "3"), "--shared-tokens cannot be used without --task-column"),
        (("--task-column", "label", "--members", "2"), "--members cannot be combined with --task-column"),
    ],
)
def test_mistakes_name_the_option(
    model_folder: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    data = write(tmp_path / "rows.jsonl", reviews())
    with pytest.raises(ValueError, match=message):
        run("train", "-m", str(model_folder), "-d", str(data), "-o", str(tmp_path / "run"), *TRAIN, *options)
