"""``train``, ``evaluate`` and ``predict`` with a model's head instead of words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_heads import HEADS, questions, save_model, tagged
from support.tiny_reviews import reviews, run
from typer.testing import CliRunner

from softprompt_fast.cli.app import app

ROWS = {"sequence-classification": reviews, "token-classification": tagged, "question-answering": questions}
STEPS = {"sequence-classification": "100", "token-classification": "60", "question-answering": "100"}
MAIN = {"sequence-classification": "accuracy", "token-classification": "span_f1", "question-answering": "exact_match"}
COMMON = ["-b", "16", "-P", "4", "--held-out", "12", "--dtype", "float32", "--device", "cpu"]
QUICK = [*COMMON, "--steps", "4", "--eval-every", "2"]
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "encoder", "encoder")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(base: Path, head: str, folder: Path, *options: str, rows: list[dict[str, Any]] | None = None) -> Any:
    data = write(folder.parent / "rows.jsonl", ROWS[head]() if rows is None else rows)
    return run("train", "-m", str(base), "-d", str(data), "--head", head, "-o", str(folder), *options)


def error(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, (ValueError, OSError)), (result.output, result.exception)
    return str(result.exception)


@every_head
def test_a_head_is_trained_scored_and_used(base: Path, head: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--steps", STEPS[head], "--lr", "0.1", "--head-learning-rate", "0.02", "--best-by", "accuracy"]
    printed = train(base, head, output, *COMMON, *options).stderr
    assert f"the head {head} is trained: it is new" in " ".join(printed.split())
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"][MAIN[head]] > 0.6 > metrics["before"][MAIN[head]]
    data = write(tmp_path / "test.jsonl", ROWS[head](20))
    common = ["--prompt", str(output / "prompt"), "--data", str(data), "--dtype", "float32", "--device", "cpu"]
    scores = json.loads(run("evaluate", *common).stdout)
    assert scores["rows"] == 20 and scores[MAIN[head]] > 0.6
    assert scores[f"{MAIN[head]}_low"] <= scores[MAIN[head]] <= scores[f"{MAIN[head]}_high"]
    run("predict", *common, "-o", str(tmp_path / "answers.jsonl"), "-b", "7")
    right = []
    for row, answer in zip(ROWS[head](20), lines(tmp_path / "answers.jsonl"), strict=True):
        if head == "sequence-classification":
            right.append(answer["prediction"] == row["label"])
            assert sum(answer["scores"].values()) == pytest.approx(1) and set(answer["scores"]) == {"no", "yes"}
        elif head == "token-classification":
            right += [said == tag for said, tag in zip(answer["prediction"], row["tags"], strict=True)]
            assert len(answer["scores"]) == len(row["tokens"]) and all(0 < p <= 1 for p in answer["scores"])
        else:
            right.append(answer["prediction"] == row["answers"]["text"][0])
            assert row["context"][answer["start"] : answer["end"]] == answer["prediction"]
            assert 0 < answer["score"] <= 1
    assert sum(right) / len(right) == pytest.approx(scores.get("accuracy", scores.get("exact_match")))


@every_head
def test_the_saved_prompt_and_head_score_as_in_the_run(base: Path, head: str, tmp_path: Path) -> None:
    rows, held_out = ROWS[head](), write(tmp_path / "held_out.jsonl", ROWS[head](10))
    train(base, head, tmp_path / "run", *QUICK, "--validation", str(held_out), rows=rows)
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    common = ["--dtype", "float32", "--device", "cpu"]
    scores = json.loads(run("evaluate", "-p", str(tmp_path / "run"), "-d", str(held_out), *common).stdout)
    assert scores == pytest.approx(after, abs=1e-5)


@every_head
def test_a_resumed_run_ends_as_if_it_were_not_interrupted(encoder: Path, head: str, tmp_path: Path) -> None:
    train(encoder, head, tmp_path / "run", *QUICK)
    last = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    whole = load_file(last / "prompt" / "adapter_model.safetensors")
    shutil.rmtree(last)
    train(encoder, head, tmp_path / "run", *QUICK, "--resume")
    again = load_file(last / "prompt" / "adapter_model.safetensors")
    assert len(whole) > 2  # the prompt, and the head's weight and bias
    assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)


def checkpoint_with_head(folder: Path, labels: dict[int, str]) -> Path:
    import transformers as tf
    from support.tiny_heads import wordpiece_tokenizer
    from support.tiny_models import BERT

    torch.manual_seed(1)
    tf.BertForSequenceClassification(tf.BertConfig(**BERT, id2label=labels)).save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return folder


def test_a_head_of_the_checkpoint_is_not_trained_if_its_labels_are_those_of_the_data(tmp_path: Path) -> None:
    base = checkpoint_with_head(tmp_path / "base", {0: "YES", 1: "NO", 2: "MAYBE"})
    printed = train(base, "sequence-classification", tmp_path / "run", *QUICK).stderr
    assert "is not trained: it is the checkpoint's" in " ".join(printed.split())
    task = json.loads((tmp_path / "run" / "prompt" / "task.json").read_text())
    assert task["head"]["labels"] == ["yes", "no", "MAYBE"]
    assert len(load_file(tmp_path / "run" / "prompt" / "adapter_model.safetensors")) == 1
    data = write(tmp_path / "new.jsonl", reviews(4))
    run("predict", "-p", str(tmp_path / "run"), "-d", str(data), "-o", str(tmp_path / "a.jsonl"), "--dtype", "float32")
    assert {row["prediction"] for row in lines(tmp_path / "a.jsonl")} <= {"yes", "no", "MAYBE"}


def test_a_head_of_the_checkpoint_is_trained_if_asked_or_if_its_labels_are_others(tmp_path: Path) -> None:
    base = checkpoint_with_head(tmp_path / "base", {0: "YES", 1: "NO"})
    printed = train(base, "sequence-classification", tmp_path / "run", *QUICK, "--train-head").stderr
    assert "is trained: it is the checkpoint's" in " ".join(printed.split())
    other = checkpoint_with_head(tmp_path / "other", {0: "happy", 1: "sad"})
    printed = train(other, "sequence-classification", tmp_path / "run2", *QUICK).stderr
    assert "is trained: its labels are new" in " ".join(printed.split())
    data = str(tmp_path / "rows.jsonl")
    message = error("train", "-m", str(other), "-d", data, "--head", "sequence-classification", "--freeze-head", *QUICK)
    assert "--freeze-head cannot be used because" in message and "with the labels of the data" in message


def test_a_prompt_without_its_head_is_refused(encoder: Path, tmp_path: Path) -> None:
    base = checkpoint_with_head(tmp_path / "base", {0: "no", 1: "yes"})
    train(base, "sequence-classification", tmp_path / "run", *QUICK)
    arguments = ["-p", str(tmp_path / "run"), "-d", str(tmp_path / "rows.jsonl"), "--model", str(encoder), "--force"]
    for command in ("evaluate", "predict"):
        assert "must hold the head sequence-classification, which" in error(command, *arguments)


def test_rows_name_prompts_of_one_head(encoder: Path, tmp_path: Path) -> None:
    base = checkpoint_with_head(tmp_path / "base", {0: "no", 1: "yes"})
    for name in ("one", "two"):
        options = [*QUICK, "--name", name, "--lr", "0.5" if name == "two" else "0.1"]
        train(base, "sequence-classification", tmp_path / f"run-{name}", *options)
        shutil.copytree(tmp_path / f"run-{name}" / name, tmp_path / "both" / name)
    names = ["one", "two"] * 4
    rows = [row | {"which": name} for row, name in zip(reviews(8), names, strict=True)]
    data, output = write(tmp_path / "new.jsonl", rows), tmp_path / "a.jsonl"
    common = ["-d", str(data), "--dtype", "float32"]
    run("predict", "-p", str(tmp_path / "both"), *common, "--prompt-name-column", "which", "-o", str(output))
    mixed = lines(output)
    for name in ("one", "two"):
        run("predict", "-p", str(tmp_path / "both" / name), *common, "-o", str(tmp_path / f"{name}.jsonl"))
        for row, alone in zip(mixed, lines(tmp_path / f"{name}.jsonl"), strict=True):
            same = row["scores"] == pytest.approx(alone["scores"], abs=1e-5)
            assert same == (row["which"] == name)
    trained = ["--name", "three", "--head-learning-rate", "0.1", "--train-head"]
    train(base, "sequence-classification", tmp_path / "run-three", *QUICK, *trained)
    shutil.copytree(tmp_path / "run-three" / "three", tmp_path / "both" / "three")
    message = error("predict", "-p", str(tmp_path / "both"), *common, "--prompt-name-column", "which")
    assert "differs from the model's, which the prompts one" in message


def test_rows_that_cannot_be_answered_get_an_error(encoder: Path, tmp_path: Path) -> None:
    train(encoder, "question-answering", tmp_path / "run", *QUICK)
    rows = [questions(1)[0], {"question": "who ?", "context": None}, {"question": "who ?"}]
    data = write(tmp_path / "new.jsonl", rows)
    output = tmp_path / "a.jsonl"
    result = CliRunner().invoke(app, ["predict", "-p", str(tmp_path / "run"), "-d", str(data), "-o", str(output)])
    assert result.exit_code == 3
    answers = lines(output)
    assert "prediction" in answers[0] and [row.get("error") for row in answers[1:]] == ["the text is empty"] * 2


def test_long_contexts_are_read_in_windows(encoder: Path, tmp_path: Path) -> None:
    options = [
        "--steps",
        "100",
        "--lr",
        "0.1",
        "--head-learning-rate",
        "0.02",
        "--max-length",
        "24",
        "--stride",
        "8",
        *COMMON,
    ]
    train(encoder, "question-answering", tmp_path / "run", *options, rows=questions(48, before=12))
    data = write(tmp_path / "new.jsonl", questions(12, before=12))
    common = ["-p", str(tmp_path / "run"), "-d", str(data), "--dtype", "float32"]
    assert json.loads(run("evaluate", *common).stdout)["exact_match"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "pooling"], "--head must be one of sequence-classification, token-classification"),
        (["--head", HEADS[0], "--task", "generation"], "--head cannot be combined with --task"),
        (["--head", HEADS[0], "--label-word", "yes=good"], "--head cannot be combined with --label-word"),
        (["--head", HEADS[0], "--deep"], "--head cannot be combined with --deep"),
        (["--head", HEADS[0], "--members", "2"], "--head cannot be combined with --members"),
        (["--head", HEADS[0], "--task-column", "label"], "--head cannot be combined with --task-column"),
        (
            ["--head", HEADS[1], "--template", "{text}"],
            "--head token-classification cannot be combined with --template",
        ),
        (["--head", HEADS[0], "--stride", "3"], "--head sequence-classification cannot be combined with --stride"),
        (["--head", HEADS[0], "--placement", "after_bos"], "placement='after_bos' cannot be combined with a head"),
        (["--head", HEADS[0], "--freeze-head"], "--freeze-head cannot be used because"),
        (["--train-head"], "--train-head cannot be used without --head"),
        (["--words-column", "x"], "--words-column cannot be used without --head"),
    ],
)
def test_what_cannot_be_combined_with_a_head(options: list[str], message: str, encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", reviews())
    assert message in error("train", "-m", str(encoder), "-d", str(data), "-o", str(tmp_path / "run"), *QUICK, *options)
    assert not (tmp_path / "run").exists()


def test_other_commands_refuse_prompts_of_a_head(encoder: Path, tmp_path: Path) -> None:
    train(encoder, "sequence-classification", tmp_path / "run", *QUICK)
    used = ["-p", str(tmp_path / "run"), "-d", str(tmp_path / "rows.jsonl")]
    for command in (["generate"], ["interpret"], ["similar"], ["monitor"], ["evaluate", "--ensemble"]):
        message = error(command[0], *used, *command[1:])
        assert "got 'prompt' of a sequence-classification head; evaluate and predict take it" in message
    assert "--ensemble cannot be combined with prompts of a head: prompt" in error("predict", *used, "--ensemble")
    assert "--max-new-tokens cannot be combined" in error("predict", *used, "--max-new-tokens", "3")
