"""The commands that ``train`` prints at its end run as they are printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_reviews import reviews, run

from softprompt_fast.cli.next_steps import after_training

COMMON = ["--steps", "2", "-b", "8", "-P", "2", "--held-out", "8", "--dtype", "float32", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["one", "ensemble", "tasks"])
def test_the_printed_commands_run(kind: str, model_folder: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "my reviews.jsonl", tmp_path / "my run"
    rows = [row | {"kind": f"task{i // 2 % 2}"} for i, row in enumerate(reviews())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"one": ["--no-deep"], "ensemble": ["--members", "2"], "tasks": ["--task-column", "kind"]}[kind]
    lines = run(
        "train", "-m", str(model_folder), "-d", str(data), "-o", str(output), *COMMON, *more
    ).stderr.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  softprompt-fast ")]
    assert [command[1] for command in commands] == ["evaluate", "predict", "train"]
    scores = json.loads(run(*commands[0][1:]).stdout)
    assert scores["rows"] == len(rows) or kind == "tasks"
    if kind != "tasks":
        assert 0 <= scores["accuracy"] <= 1
    run(*commands[1][1:])
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(rows) and all(row["prediction"] in ("yes", "no") for row in answers)
    assert "--resume" in commands[2]
    run(*commands[2][1:])
    assert json.loads((output / "metrics.json").read_text())["steps"] == 4


def test_an_interrupted_run_continues_with_the_same_steps(tmp_path: Path) -> None:
    given = {"--model": "m", "--data": "rows.jsonl", "--steps": 50, "--label-word": ["a=x", "b=y z"]}
    for interrupted, steps in ((True, "50"), (False, "24")):
        result = SimpleNamespace(folder=tmp_path / "run" / "prompt", steps=12, interrupted=interrupted)
        command = after_training(given, [result], prompt="run/prompt", more={"--ensemble": False})[2]
        words = shlex.split(command)
        assert words[words.index("--steps") + 1] == steps and "--resume" in words
        assert words.count("--label-word") == 2 and "b=y z" in words


def test_epochs_stay_epochs(tmp_path: Path) -> None:
    result = SimpleNamespace(folder=tmp_path / "prompt", steps=12, interrupted=False)
    given = {"--model": "m", "--data": "rows.jsonl", "--epochs": 1.5, "--validation": "other.csv"}
    evaluate, _, proceed = after_training(given, [result], prompt="run/prompt", more={"--ensemble": False})
    assert "--data other.csv" in evaluate
    assert "--epochs 3.0" in proceed and "--steps" not in proceed
