"""Versions of prompts that were trained with a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_heads import save_model, tagged
from support.tiny_reviews import run
from typer.testing import CliRunner

from softprompt_fast.cli.app import app
from softprompt_fast.registry import PromptRegistry

MACHINE = ["--dtype", "float32", "--device", "cpu"]


def test_a_version_holds_the_head(registry: PromptRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    base = save_model(tmp_path / "base", "encoder")
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for path, rows in ((data, tagged()), (held_out, tagged(8))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["-o", str(tmp_path / "run"), "--validation", str(held_out), "--steps", "4", "-P", "4", *MACHINE]
    run("train", "-m", str(base), "-d", str(data), "--head", "token-classification", *options, "--register", "tags")
    assert [str(version) for version in registry.versions("tags")] == ["tags@1"]
    assert "span f1 " in run("versions", "list").stdout
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    scores = json.loads(run("evaluate", "-p", "tags@1", "-d", str(held_out), *MACHINE).stdout)
    assert scores == pytest.approx(after, abs=1e-5)
    arguments = ["versions", "diff", "tags@1", str(tmp_path / "run"), "--data", str(data)]
    message = str(CliRunner().invoke(app, arguments).exception)
    assert "cannot be compared with data if they have a head, got token-classification" in message
