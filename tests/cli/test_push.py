"""The command ``push``, and commands with prompts on the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_stand_in import HubStandIn
from support.tiny_reviews import reviews
from typer.testing import CliRunner

from softprompt_fast.cli.app import app

SHORT = ("--held-out", 4, "--steps", 1, "--dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with rows and a run with one prompt."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews(12)))
    words = ["train", "-m", model_folder, "-d", folder / "rows.jsonl", "-o", folder / "run", *SHORT, "-P", 4]
    words += ["--name", "moods"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return folder


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output if status == 0 else str(result.exception)


def test_a_run_is_pushed_and_used_by_its_name(hub: HubStandIn, place: Path, model_folder: Path) -> None:
    text = run("push", place / "run", "me/moods", "--private", "--message", "the first", "--base-model", "org/base")
    assert "uploaded to" in text and "softprompt-fast predict --prompt me/moods --data" in text
    assert hub.repositories["me/moods"].private and hub.repositories["me/moods"].messages[-1] == "the first"
    assert "reviews" not in str(sorted(hub.files("me/moods")))
    common = ("-d", place / "rows.jsonl", "-m", model_folder, "--dtype", "float32")
    found, expected = (
        json.loads(CliRunner().invoke(app, [str(word) for word in ("evaluate", "-p", prompt, *common)]).stdout)
        for prompt in ("me/moods", place / "run")
    )
    assert found == expected
    run("predict", "-p", "me/moods@main", "-o", place / "answers.jsonl", *common)
    assert len((place / "answers.jsonl").read_text().splitlines()) == 12
    data = ("-d", place / "rows.jsonl", "-m", model_folder)
    run("train", "--init", "me/moods", "-o", place / "more", *data, *SHORT)
    assert json.loads((place / "more" / "metrics.json").read_text())["settings"]["init"] == "me/moods"


def test_a_branch_is_made(hub: HubStandIn, place: Path) -> None:
    text = run("push", place / "run" / "moods", "me/moods", "--revision", "v2")
    assert "--prompt me/moods@v2" in text
    assert "task.json" in hub.files("me/moods", "v2") and "task.json" not in hub.files("me/moods")


def test_a_version_is_pushed_and_stays_as_it_was(hub: HubStandIn, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(Path.cwd()))
    run("versions", "add", place / "run" / "moods", "--name", "moods", "--alias", "production")
    run("push", "moods@production", "me/version")
    assert "## Scores" in hub.files("me/version")["README.md"].decode()
    assert "version.json" not in hub.files("me/version")
    assert "0 faults" in run("versions", "verify")


def test_a_mistake_is_one_line(hub: HubStandIn, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softprompt_fast", "evaluate", "-p", "me/missing", "-d", "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: me/missing is no folder here and no repository on the Hub")
    assert "no prompt was found" in run("push", tmp_path, "me/nothing", status=1)


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
