"""Commands with prompts that other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.peft_models import base_model, peft_model
from support.tiny_reviews import reviews, tiny_tokenizer
from typer.testing import CliRunner

import softprompt_fast as spf
from softprompt_fast.cli.app import app
from softprompt_fast.prompts.peft_files import read_prompt

pytest.importorskip("peft")

LABELS = ("--label-word", "yes=yes", "--label-word", "no=no", "--dtype", "float32")
WORDS = ("--template", "{text} Label :", *LABELS)
STEP = ("--held-out", "4", "--steps", "1", "--learning-rate", "1e-12", *LABELS, "--init")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, rows and prompts of PEFT."""
    folder = tmp_path_factory.mktemp("place")
    base_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews(12)))
    for kind in ("PromptEncoder", "Cartridge"):
        options = {"encoder_hidden_size": 16} if kind == "PromptEncoder" else {}
        peft_model("llama", kind=kind, **options).eval().save_pretrained(folder / kind)
    many = peft_model("llama", kind="MultitaskPromptTuning", num_tasks=2, num_ranks=2)
    with torch.no_grad():
        many.prompt_encoder["default"].prefix_task_cols.add_(2)
        many.prompt_encoder["default"].prefix_task_rows.add_(2)
    many.save_pretrained(folder / "many")
    return folder


def run(place: Path, *arguments: object, status: int = 0) -> str:
    words = [str(a) for a in (*arguments, "-m", place / "model", "-d", place / "rows.jsonl")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.stdout if status == 0 else str(result.exception)


@pytest.mark.parametrize("kind", ["PromptEncoder", "Cartridge", "many#1"])
def test_a_prompt_of_peft_scores_as_its_numbers_do(kind: str, place: Path, tmp_path: Path) -> None:
    found = json.loads(run(place, "evaluate", "-p", place / kind, *WORDS))
    deep = kind == "Cartridge"
    tuned = (spf.DeepPromptModel if deep else spf.SoftPromptModel)(base_model("llama"))
    tuned.load_prompt(place / kind, "own")
    tuned.save_pretrained(tmp_path, peft_type="PREFIX_TUNING" if deep else None)
    expected = json.loads(run(place, "evaluate", "-p", tmp_path / "own", *WORDS))
    assert found == expected and found["rows"] == 12
    answers = [json.loads(line) for line in run(place, "predict", "-p", place / kind, *WORDS).splitlines()]
    assert len(answers) == 12 and {answer["prediction"] for answer in answers} <= {"yes", "no"}


def test_all_tasks_of_a_folder_answer_together(place: Path, tmp_path: Path) -> None:
    rows = [row | {"task": f"many-{number % 2}"} for number, row in enumerate(reviews(12))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["predict", "-p", str(place / "many"), "-m", str(place / "model"), "-d", str(data), *WORDS]
    result = CliRunner().invoke(app, [*words, "--prompt-name-column", "task"])
    assert result.exit_code == 0, result.output
    together = [json.loads(line)["prediction"] for line in result.stdout.splitlines()]
    alone = []
    for task in (0, 1):
        lines = run(place, "predict", "-p", f"{place}/many#{task}", *WORDS).splitlines()
        alone.append([json.loads(line)["prediction"] for line in lines])
    assert together == [alone[number % 2][number] for number in range(12)]
    assert "must hold one prompt, got many-0, many-1" in run(place, "evaluate", "-p", place / "many", *WORDS, status=1)


def test_a_run_starts_from_a_file(place: Path, tmp_path: Path) -> None:
    values = torch.randn(3, 32)
    np.save(tmp_path / "start.npy", values.numpy())
    run(place, "train", *STEP, tmp_path / "start.npy", "-o", tmp_path / "file")
    assert torch.allclose(read_prompt(tmp_path / "file" / "prompt")[0], values, atol=1e-6)
    run(place, "train", *STEP, f"{place / 'many'}#1", "-o", tmp_path / "task")
    expected = read_prompt(place / "many#1")[0]
    assert torch.allclose(read_prompt(tmp_path / "task" / "prompt")[0], expected, atol=1e-6)
    torch.save({"prompt_embeddings": values}, tmp_path / "start.bin")
    message = run(place, "train", *STEP, tmp_path / "start.bin", "-o", tmp_path / "pickle", status=1)
    assert "got a pickle, which could run any code; convert it: python -c" in message


def test_a_deep_run_keeps_its_sink(place: Path, tmp_path: Path) -> None:
    common = ("--deep", "--num-frozen-tokens", "1", "--virtual-tokens", "3", "--held-out", "4", "--steps", "2")
    run(place, "train", *common, *LABELS, "-o", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "prompt" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_frozen_tokens"]) == ("CARTRIDGE", 1)
