"""The main job on a tiny model: train, resume, interrupt, evaluate, predict, from Python and the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import build
from support.tiny_reviews import reviews, run, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.cli.app import console, main
from softprompt_fast.evaluation.intervals import wilson_interval
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.hf.loading import load_base_model
from softprompt_fast.tasks.collation import Collator
from softprompt_fast.tasks.encoding import encode
from softprompt_fast.tasks.examples import split_rows
from softprompt_fast.tasks.tables import load_rows
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.run import tune


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews()))
    return path


def train_command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--model", str(model), "--data", str(data), "--output", str(output), "--dtype", "float32", *more]


def test_train_evaluate_predict_from_the_command_line(model_folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(
        *train_command(
            model_folder, data, output, "--steps", "60", "-b", "16", "-P", "4", "--held-out", "16", "--lr", "0.3"
        )
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] >= 0.9 > metrics["before"]["accuracy"]
    assert {f.name for f in (output / "prompt").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "profile.json",
        "task.json",
    }
    scores = json.loads(run("evaluate", "--prompt", str(output), "--data", str(data), "--dtype", "float32").stdout)
    assert scores["accuracy"] >= 0.9 and scores["rows"] == 64
    found = tmp_path / "found.jsonl"
    run("predict", "--prompt", str(output / "prompt"), "--data", str(data), "-o", str(found), "--dtype", "float32")
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in reviews()]
    assert sum(row["prediction"] == row["label"] for row in rows) / len(rows) == pytest.approx(scores["accuracy"])
    assert all(sum(row["scores"].values()) == pytest.approx(1.0) for row in rows)


def test_generation_learns_its_response(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "response"], *[[row["text"], "very fine film"] for row in reviews(32)]])
    output = tmp_path / "run"
    command = train_command(
        model_folder, data, output, "--task", "generation", "--steps", "120", "--lr", "0.3", "-P", "4"
    )
    run(*command)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    found = run("predict", "-p", str(output), "-d", str(data), "--max-new-tokens", "4", "--dtype", "float32").stdout
    answers = [json.loads(line)["prediction"] for line in found.splitlines()]
    assert answers.count("very fine film") > len(answers) / 2


def test_encoder_decoders_are_tuned_too(tmp_path: Path) -> None:
    tuned, tokenizer = spf.SoftPromptModel(build("t5")), tiny_tokenizer()
    task = classification_task(reviews(), prompt="p")
    result = tune(tuned, tokenizer, task, reviews(), reviews(16), tmp_path, steps=60, learning_rate=0.1, batch_size=16)
    assert result.after["loss"] < 0.95 * result.before["loss"]


def prompt_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


def test_the_same_seed_gives_the_same_prompt_and_another_another(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(*train_command(model_folder, data, tmp_path / folder, "--steps", "4", "--seed", seed, "-b", "8"))
    assert torch.equal(prompt_of(tmp_path / "a"), prompt_of(tmp_path / "b"))
    assert not torch.equal(prompt_of(tmp_path / "a"), prompt_of(tmp_path / "c"))


def test_ctrl_c_leaves_a_usable_prompt_and_resume_goes_on(model_folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = train_command(model_folder, data, output, "--steps", "4000", "--eval-every", "5", "-b", "8")
    process = subprocess.Popen(
        [sys.executable, "-m", "softprompt_fast", *command], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/checkpoint-*/prompt/adapter_config.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert "--resume" in shown
    stopped = json.loads((output / "metrics.json").read_text())["steps"]
    assert 5 <= stopped < 4000
    tuned = spf.SoftPromptModel.from_pretrained(build("llama"), output)
    assert tuned.prompts.names == ["prompt"]
    run(
        *train_command(
            model_folder, data, output, "--steps", str(stopped + 5), "--eval-every", "5", "-b", "8", "--resume"
        )
    )
    assert json.loads((output / "metrics.json").read_text())["steps"] == stopped + 5


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def tuned(folder: str, **options: Any) -> torch.Tensor:
        model = spf.SoftPromptModel(build("llama"))
        task = classification_task(reviews(), prompt="prompt")
        tune(
            model,
            tiny_tokenizer(),
            task,
            reviews(),
            reviews(8),
            tmp_path / folder,
            eval_every=4,
            batch_size=8,
            **options,
        )
        last = sorted((tmp_path / folder / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1]
        return load_file(last / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]

    whole = tuned("whole", steps=8)
    half = tmp_path / "half"
    tuned("half", steps=8)
    for checkpoint in half.glob("checkpoints/checkpoint-8"):
        for file in sorted(checkpoint.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        checkpoint.rmdir()
    assert torch.allclose(tuned("half", steps=8, resume=True), whole, atol=1e-6)


def test_multi_token_labels_are_scored_whole() -> None:
    tuned, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    tuned.add_prompt("p", init=torch.randn(3, 32))
    task = Task("classification", "{text}", "label", {"a": " very fine", "b": " very dull"}, prompt="p")
    found = predict(tuned, tokenizer, task, [{"text": "film plot"}, {"text": "plot"}])
    for text, result in zip(("film plot", "plot"), found, strict=True):
        expected = []
        for words in ("very fine", "very dull"):
            ids = torch.tensor([tokenizer(f"{text} {words}").input_ids])
            logits = tuned(ids).logits[0].log_softmax(-1)
            expected.append((logits[-3, ids[0, -2]] + logits[-2, ids[0, -1]]).item())
        probability = torch.tensor(expected).softmax(0)[0].item()
        assert result["scores"]["a"] == pytest.approx(probability, abs=1e-5)


def test_predictions_do_not_depend_on_batching() -> None:
    tuned, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    tuned.add_prompt("p", init=torch.randn(3, 32))
    task = classification_task(reviews(), prompt="p")
    one, many = (predict(tuned, tokenizer, task, reviews(13), batch_size=size) for size in (1, 8))
    for a, b in zip(one, many, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-6)


def test_evaluate_counts_what_predict_says() -> None:
    tuned, tokenizer = spf.SoftPromptModel(build("llama")), tiny_tokenizer()
    task = classification_task(reviews(), prompt="p")
    scores = evaluate(tuned, tokenizer, task, reviews(20))
    found = predict(tuned, tokenizer, task, reviews(20))
    hits = sum(p["prediction"] == row["label"] for p, row in zip(found, reviews(20), strict=True))
    assert scores["accuracy"] == hits / 20
    assert scores["accuracy_low"] < scores["accuracy"] < scores["accuracy_high"] or hits in (0, 20)


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    rows = reviews(6)
    path = tmp_path / f"rows.{kind}"
    data = Dataset.from_list(rows)
    if kind == "jsonl":
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    assert load_rows(str(path)) == rows


def test_a_file_that_cannot_be_read_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"\n{"text"')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not JSON"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_features_mark_only_the_answer_and_long_texts_keep_their_end() -> None:
    task = classification_task(reviews(), max_length=4)
    row = {"text": "film plot very very very fine", "label": "yes"}
    (feature,) = encode(task, [row], tiny_tokenizer())
    ids = tiny_tokenizer()("very fine Label : yes").input_ids
    assert feature == {"input_ids": ids, "labels": [-100] * 4 + ids[-1:]}
    batch = Collator(0)([feature, {"input_ids": [5], "labels": [-100]}])
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [-100] * 5 and batch["lengths"] == [5, 1] and batch["num_targets"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--data": "absent.jsonl"}, "no such file: absent.jsonl"),
        ({"--data": __file__}, "must be a .jsonl, .*hub"),
        ({"--text-column": "body"}, "the template names column 'body', but the data has"),
        ({"--label-column": "class"}, "no column 'class' in the data"),
        ({"--template": "no columns"}, "`template` must name at least one column"),
        ({"--template": "{text"}, "`template` must have columns in braces"),
        ({"--label-word": "yes"}, "must be LABEL=WORD, got 'yes'"),
        ({"--held-out": "64"}, "`held_out` must leave rows on both sides of 64"),
        ({"--init": "nonsense"}, "`init` must be"),
        ({"--init": "text"}, "--init-text must hold text"),
        ({"--dtype": "int8"}, "`dtype` must be"),
        ({"--resume": ""}, "nothing to resume"),
    ],
)
def test_mistakes_are_one_line(
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    options: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = train_command(model_folder, data, tmp_path / "run", "--steps", "1")
    for name, value in options.items():
        command += [name, value] if value else [name]
    monkeypatch.setattr(sys, "argv", ["softprompt-fast", *command])
    shown: list[str] = []
    monkeypatch.setattr(console, "print", lambda *text, **_: shown.append(" ".join(map(str, text))))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert re.search(message, "\n".join(shown)), shown


def test_an_output_folder_is_not_overwritten(model_folder: Path, data: Path, tmp_path: Path) -> None:
    run(*train_command(model_folder, data, tmp_path / "run", "--steps", "1"))
    with pytest.raises(FileExistsError, match=r"run\.json already exists; resume the run, or choose another"):
        run(*train_command(model_folder, data, tmp_path / "run", "--steps", "1"))


def test_split_is_seeded_and_disjoint() -> None:
    rows = [{"n": i} for i in range(50)]
    train, held = split_rows(rows, 0.2, seed=3)
    assert len(held) == 10 and sorted(r["n"] for r in train + held) == list(range(50))
    assert split_rows(rows, 10, seed=3)[1] == held != split_rows(rows, 10, seed=4)[1]


def test_base_models_load_by_folder(model_folder: Path) -> None:
    model, tokenizer = load_base_model(str(model_folder), "float32", "cpu")
    assert model.dtype == torch.float32 and tokenizer.pad_token == "<pad>"
