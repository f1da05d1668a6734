"""The commands analyze, interpret, prune and similar; the package's imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.analysis_cases import tuned_on
from support.tiny_reviews import reviews, run

from softprompt_fast.analysis.transfer import NO_PROMPT
from softprompt_fast.tasks.task import classification_task


@pytest.fixture
def files(tmp_path: Path, model_folder: Path) -> dict[str, str]:
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(24)))
    tuned = tuned_on(first=torch.randn(3, 32), second=torch.randn(4, 32))
    tuned.save_pretrained(tmp_path / "prompts")
    for name in tuned.prompts:
        classification_task(reviews(), prompt=name, model=str(model_folder)).save(tmp_path / "prompts" / name)
    return {"data": str(data), "model": str(model_folder), "prompts": str(tmp_path / "prompts")}


def test_analyze_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "deep" / "a.json", tmp_path / "a.svg"
    common = ["-m", files["model"], "-d", files["data"], "--dtype", "float32", "--held-out", "8"]
    shown = run("analyze", *common, "-o", str(report), "--figure", str(figure)).output
    found = json.loads(report.read_text())
    assert found["classes"] == {"no": 8, "yes": 8} and found["zero_shot"]["rows"] == 8
    assert "Recipe" in shown and "too few rows" in shown and "softprompt-fast train --virtual-tokens 10" in shown
    assert "<svg" in figure.read_text()
    run("analyze", *common, "--task", "generation", "--input-column", "text", "--output-column", "label")


def test_interpret_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "i.json", tmp_path / "i.svg"
    common = ["interpret", "-p", files["prompts"], "--dtype", "float32"]
    shown = run(*common, "-d", files["data"], "--ablate", "second", "-o", str(report), "--figure", str(figure)).output
    found = json.loads(report.read_text())
    assert "not an explanation" in found["caveat"] and "not an explanation" in " ".join(shown.split())
    assert found["ablation"]["prompt"] == "second" and len(found["ablation"]["loss_change"]) == 4
    assert set(found["prompts"]) == {"first", "second"} and figure.is_file()
    with pytest.raises(ValueError, match="--ablate must name one of the 2 prompts"):
        run(*common, "-d", files["data"])
    one = run("interpret", "-p", f"{files['prompts']}/first", "-d", files["data"], "--dtype", "float32").output
    assert "whole prompt on 24 rows" in one


def test_prune_command(files: dict[str, str], tmp_path: Path) -> None:
    out, figure = tmp_path / "short", tmp_path / "p.svg"
    command = ["prune", "-p", f"{files['prompts']}/second", "-d", files["data"], "-o", str(out), "--dtype", "float32"]
    shown = run(*command, "--min-tokens", "2", "--tolerance", "100", "--figure", str(figure)).output
    assert "2 kept" in shown and "other rows, 12" in shown and figure.is_file()
    assert len(json.loads((out / "pruning.json").read_text())["removed"]) == 2
    scores = json.loads(run("evaluate", "-p", str(out), "-d", files["data"], "--dtype", "float32").stdout)
    assert scores["rows"] == 24
    with pytest.raises(FileExistsError):
        run(*command)


def test_similar_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "s.json", tmp_path / "s.svg"
    common = ["similar", "-p", files["prompts"], "--dtype", "float32"]
    run(*common, "-d", files["data"], "-o", str(report), "--figure", str(figure))
    assert {s["name"] for s in json.loads(report.read_text())} == {"first", "second", NO_PROMPT}
    run(*common, "--target", f"{files['prompts']}/first", "-o", str(report))
    (only,) = json.loads(report.read_text())
    assert only["name"] == "second" and only["scores"] is None and abs(only["mean_cosine"]) < 1
    with pytest.raises(ValueError, match=r"must end with \.svg"):
        run(*common, "-d", files["data"], "--figure", str(tmp_path / "s.txt"))


@pytest.mark.parametrize("package", ["analysis", "comparison"])
def test_importing_the_package_imports_no_matplotlib(package: str) -> None:
    code = f"import sys, softprompt_fast.{package}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
