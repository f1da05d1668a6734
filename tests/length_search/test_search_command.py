"""``softprompt-fast search``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_reviews import reviews, run

from softprompt_fast.cli.app import app, console, main
from softprompt_fast.length_search import candidate_run


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
    tune_tasks = candidate_run.tune_tasks

    def interrupted(*arguments: Any, **options: Any) -> Any:
        results = tune_tasks(*arguments, **options)
        calls.append(results[0].steps)
        if len(calls) == 2:
            results[0].interrupted = True  # as after Ctrl-C
        return results

    monkeypatch.setattr(candidate_run, "tune_tasks", interrupted)
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
