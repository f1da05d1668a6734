"""Answers to rows of files: a prompt per row, every format, interrupted and resumed, with Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer
from typer.testing import CliRunner

import softprompt_fast as spf
from softprompt_fast.cli.app import app
from softprompt_fast.inference.files import in_chunks, write_answers
from softprompt_fast.tasks.task import Task

ROWS = [{"id": i, "text": row["text"], "task": ("tone", "story", "")[i % 3]} for i, row in enumerate(reviews(20))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and two prompts with tasks of either kind."""
    model, prompts = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("prompts")
    build("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    tuned = spf.SoftPromptModel(build("llama"))
    tasks = {
        "tone": Task("classification", "{text} Label :", "label", {"good": "yes", "bad": "no"}, model=str(model)),
        "story": Task("generation", "{text}", "response", model=str(model)),
    }
    for length, (name, task) in enumerate(tasks.items(), 3):
        tuned.add_prompt(name, init=torch.randn(length, 32))
        tuned.save_pretrained(prompts, [name])
        task.save(prompts / name)
    return {"model": model, "prompts": prompts}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    return frame.to_dict("records")  # type: ignore[no-any-return]


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.stdout


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_predict_with_a_prompt_for_each_row(folders: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    rows = [row for row in ROWS if row["task"]]
    data, output = write(tmp_path / f"data{suffix}", rows), tmp_path / f"answers{suffix}"
    common = ("predict", "-p", folders["prompts"], "-d", data, "--prompt-name-column", "task", "--dtype", "float32")
    run(*common, "-o", output, "--max-new-tokens", "4")
    found = read(output)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert {row["prediction"] for row in found if row["task"] == "tone"} <= {"good", "bad"}
    printed = [json.loads(line) for line in run(*common, "--max-new-tokens", "4").splitlines()]
    for one, other in zip(found, printed, strict=True):
        assert str(one["prediction"] or "").replace("nan", "") == other["prediction"]
    assert not list(tmp_path.glob("*.partial.*"))


def test_generate_marks_rows_it_cannot_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2]["task"], rows[5]["text"] = "unknown", ""
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    common = ("-p", folders["prompts"], "-d", data, "--prompt-name-column", "task", "--dtype", "float32")
    run("generate", *common, "-o", output, "--max-new-tokens", "3", status=3)
    found = read(output)
    errors = {i for i, row in enumerate(found) if "error" in row}
    assert errors == {2, 5} and all("generated" in row for i, row in enumerate(found) if i not in errors)
    assert "no prompt 'unknown'" in found[2]["error"]


def test_blank_texts_among_numbers_stay_in_a_table(tmp_path: Path) -> None:
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": "  "}, {"text": "c", "x": None}]
    answers = in_chunks(lambda rows, names: [{"prediction": "p"} for _ in rows], rows, [None] * 3, chunk=4)
    output = tmp_path / "a.parquet"
    assert write_answers(rows, answers, output) == (3, 0)
    assert pd.read_parquet(output)["x"].fillna("none").tolist() == ["1", "  ", "none"]


def test_a_run_is_resumed_without_losing_or_repeating_rows(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(rows: Sequence[dict[str, Any]], names: Sequence[str | None]) -> list[dict[str, Any]]:
        if any(row["id"] == 11 for row in rows) and len(asked) < 12:
            raise KeyboardInterrupt
        asked.extend(row["id"] for row in rows)
        return [{"prediction": row["id"] * 2} for row in rows]

    answers = in_chunks(answer, ROWS, [None] * len(ROWS), chunk=4)
    for output in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            write_answers(ROWS, answers, output)
        assert asked == list(range(8))
        with pytest.raises(FileExistsError, match="already holds answers"):
            write_answers(ROWS, answers, output)
        lines = next(tmp_path.glob("a*.jsonl"))
        with lines.open("ab") as file:  # a line that was being written
            file.write(b'{"id": 8, "predic')
        asked.extend([-1] * 4)  # no interruption any more
        assert write_answers(ROWS, answers, output, resume=True) == (12, 0)
        assert [n for n in asked if n >= 0] == list(range(20))
        assert [row["prediction"] for row in read(output)] == [2 * i for i in range(20)]
        assert write_answers(ROWS, answers, output, resume=True) == (0, 0) and len(asked) == 24
        if output.suffix == ".jsonl":
            with pytest.raises(ValueError, match="line 1 is another row"):
                write_answers(ROWS[1:], answers, output, resume=True)
        output.unlink()


def test_bad_calls_of_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    common = ["-p", str(folders["prompts"]), "-d", str(data), "--dtype", "float32"]
    for arguments, message in (
        (["predict", *common], "--prompt-name-column must be given, because there are 2 prompts"),
        (["predict", *common, "--prompt-name-column", "nothing"], "no column 'nothing' in the data"),
        (["predict", *common, "--prompt-name-column", "task", "-o", "answers.txt"], "`output` must end in .jsonl"),
        (["predict", "-p", str(tmp_path), "-d", str(data)], "must be a PEFT adapter folder or hold some"),
        (["predict", *common, "--prompt-name-column", "task", "--engine", "ray"], "--output must be given"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code != 0 and message in str(result.exception), (result.exception, message)


WORKER_DIES = """
import json, os
from pathlib import Path
from softprompt_fast.inference import files, ray_engine

class Dies(ray_engine.Worker):
    def __call__(self, batch):
        marker = Path(os.environ["SPF_MARKER"])
        if 100 in batch["index"].tolist() and not marker.exists():
            marker.write_text("died")
            os._exit(1)
        return super().__call__(batch)

ray_engine.Worker = Dies
rows = json.loads(Path(os.environ["SPF_ROWS"]).read_text())
settings = {"batch_size": 8, "batch_tokens": 512, "dtype": "float32", "device": "cpu"}
answers = ray_engine.RayAnswers(
    rows, [row["task"] or None for row in rows], Path(os.environ["SPF_PROMPTS"]), os.environ["SPF_MODEL"], 2,
    {"max_new_tokens": 3}, settings,
)
print(files.write_answers(rows, answers, Path(os.environ["SPF_OUT"]), resume=True))
"""


def test_ray_loses_no_row_when_a_worker_dies(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rows = [{"id": i, "text": row["text"], "task": ("tone", "story")[i % 2]} for i, row in enumerate(reviews(300))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    environment = os.environ | {
        "SPF_MARKER": str(tmp_path / "died"),
        "SPF_ROWS": str(tmp_path / "rows.json"),
        "SPF_PROMPTS": str(folders["prompts"]),
        "SPF_MODEL": str(folders["model"]),
        "SPF_OUT": str(tmp_path / "out.jsonl"),
        "PYTHONPATH": os.pathsep.join([str(Path(spf.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    script = tmp_path / "dies.py"
    script.write_text(WORKER_DIES)
    command = [sys.executable, str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "died").exists()
    found = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == list(range(300)) and not any("error" in row for row in found)
    local = tmp_path / "local.jsonl"
    data = write(tmp_path / "data.jsonl", rows)
    common = ("-p", folders["prompts"], "-d", data, "--prompt-name-column", "task", "--dtype", "float32")
    run("predict", *common, "-o", local, "--max-new-tokens", "3")
    assert [row["prediction"] for row in read(local)] == [row["prediction"] for row in found]


class InThisProcess:
    """What the engine uses of Ray's data, run here."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def map_batches(self, worker: Any, fn_constructor_args: Any, **options: Any) -> InThisProcess:
        self.worker = worker(*fn_constructor_args)
        return self

    def iter_batches(self, **options: Any) -> Any:
        yield self.worker({key: np.array([item[key] for item in self.items]) for key in self.items[0]})


def test_ray_checks_the_base_and_takes_a_template(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.data, "from_items", lambda items, **options: InThisProcess(items))
    other, bare = tmp_path / "other", tmp_path / "bare"
    another = build("llama")
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.neg_()
    another.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    shutil.copytree(folders["prompts"] / "tone", bare)
    (bare / "task.json").unlink()
    data = write(tmp_path / "data.jsonl", [{"text": "film"}, {"text": "dull film"}])
    common = ("-d", data, "--dtype", "float32", "--engine", "ray", "--workers", "1", "-p", folders["prompts"] / "tone")
    result = CliRunner().invoke(app, ["predict", *map(str, (*common, "-m", other, "-o", tmp_path / "a.jsonl"))])
    assert result.exit_code == 1 and "tone: the prompt's base model must be" in str(result.exception)
    run("predict", *common, "-m", other, "-o", tmp_path / "b.jsonl", "--force")
    task = (
        "--template",
        "{text} Label :",
        "--label-word",
        "good=yes",
        "--label-word",
        "bad=no",
        "-m",
        folders["model"],
    )
    run("predict", *common[:-1], bare, *task, "-o", tmp_path / "c.jsonl")
    run("predict", *common, "-o", tmp_path / "d.jsonl")
    answers = [[row["prediction"] for row in read(tmp_path / f"{name}.jsonl")] for name in "cd"]
    assert answers[0] == answers[1] and set(answers[0]) <= {"good", "bad"}
