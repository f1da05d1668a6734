"""``monitor`` and ``predict --log``: files, the statuses 0, 1 and 2, and inputs that are wrong."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.analysis_cases import tuned_on
from support.tiny_reviews import BAD, GOOD, run, tiny_tokenizer

from softprompt_fast.cli.app import main
from softprompt_fast.evaluation.profile import record_profile
from softprompt_fast.tasks.task import classification_task, generation_task

Runs = Callable[..., tuple[int, str]]


def drawn(count: int, seed: int, *, shift: bool = False) -> list[dict[str, Any]]:
    """Reviews of any length; shifted ones are longer, and bad."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        good = not shift and draw.random() < 0.5
        words = ["film", "plot", *draw.choices(["very", "film", "plot", *GOOD, *BAD], k=draw.randint(3, 9) + 9 * shift)]
        rows.append({"text": " ".join([*words, draw.choice(GOOD if good else BAD)]), "label": "yes" if good else "no"})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a tuned prompt, its profile, and files of rows."""
    folder = tmp_path_factory.mktemp("monitor")
    data, held_out = written(folder / "train.jsonl", drawn(32, 0)), written(folder / "held_out.jsonl", drawn(80, 1))
    common = ["train", "-m", str(model_folder), "-d", data, "--validation", held_out, "-o", str(folder / "run")]
    run(*common, "--steps", "2", "--virtual-tokens", "3", "--dtype", "float32")
    written(folder / "same.jsonl", drawn(60, 2))
    written(folder / "other.jsonl", drawn(60, 3, shift=True))
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    """Runs ``monitor`` as a shell does; gives the status and what was shown."""
    monkeypatch.setenv("COLUMNS", "100")

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["softprompt-fast", "monitor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(str(stop.value.code or 0)), shown.err + shown.out

    return start


def test_same_and_other_rows(trained: Path, tmp_path: Path, runs: Runs) -> None:
    files = ["--report", tmp_path / "r.html", "--json", tmp_path / "r.json", "--prometheus", tmp_path / "r.prom"]
    common = ["-p", trained / "run", "--dtype", "float32", "--history", tmp_path / "days", *files]
    assert (trained / "run" / "prompt" / "profile.json").is_file()
    status, shown = runs(*common, "-d", trained / "same.jsonl")
    assert status == 0 and "fine: none of 7 tests found drift" in shown, shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["status"] == "fine" and report["rows"] == 60 and report["reference_rows"] > 70
    assert "Over time" not in (tmp_path / "r.html").read_text()
    status, shown = runs(*common, "-d", trained / "other.jsonl")
    assert status == 1 and "drift in text length" in shown
    assert "Over time" in (tmp_path / "r.html").read_text()
    assert 'softprompt_monitor_drift{prompt="prompt"' in (tmp_path / "r.prom").read_text()
    assert len((tmp_path / "days" / "history.jsonl").read_text().splitlines()) == 2


def test_a_log_needs_no_model(trained: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "answers.log"
    common = ["-p", str(trained / "run"), "--dtype", "float32"]
    for name in ("same", "other"):
        run("predict", *common, "-d", str(trained / f"{name}.jsonl"), "--log", str(log), "--log-texts", "no")
    lines = log.read_text().splitlines()
    assert len(lines) == 120 and "film" not in log.read_text()
    json_file = tmp_path / "r.json"
    _, shown = runs(*common, "-d", trained / "same.jsonl", "--no-bare", "--json", json_file)
    second_pass = json.loads(json_file.read_text())["tests"]
    log.write_text("\n".join(lines[:60]) + "\n" + lines[60][:50])
    monkeypatch.setattr("softprompt_fast.hf.loading.load_base_model", None)
    status, shown = runs("-p", trained / "run", "--log", log, "--json", json_file)
    assert status == 0, shown
    for one, other in zip(json.loads(json_file.read_text())["tests"], second_pass, strict=True):
        assert one["name"] == other["name"] and one["skipped"] == other["skipped"]
        assert one["p"] is None or one["p"] == pytest.approx(other["p"], rel=1e-6), one["name"]
    log.write_text("\n".join(lines[60:]) + "\n")
    assert runs("-p", trained / "run", "--log", log)[0] == 1


def test_few_rows_are_not_judged(trained: Path, tmp_path: Path, runs: Runs) -> None:
    data = written(tmp_path / "three.jsonl", drawn(3, 4, shift=True))
    status, shown = runs("-p", trained / "run", "-d", data, "--dtype", "float32", "--prometheus", tmp_path / "r.prom")
    assert status == 2 and "too few rows to judge: 3 distinct rows" in shown
    assert "softprompt_monitor_judged" in (tmp_path / "r.prom").read_text()


def test_a_folder_without_a_profile_needs_reference_rows(trained: Path, tmp_path: Path, runs: Runs) -> None:
    old = tmp_path / "old"
    shutil.copytree(trained / "run" / "prompt", old)
    profile = json.loads((old / "profile.json").read_text())
    (old / "profile.json").unlink()
    common = ["-p", old, "-d", trained / "same.jsonl", "--dtype", "float32"]
    status, shown = runs(*common)
    assert status == 2 and "has no profile.json" in shown and "--reference" in shown
    status, shown = runs(*common, "--reference", trained / "held_out.jsonl", "--record")
    assert status == 0 and "compared with" in shown and "rows of held_out.jsonl" in shown
    again = json.loads((old / "profile.json").read_text())
    assert {key for key in again if again[key] != profile[key]} == {"source"}
    assert runs(*common)[0] == 0
    assert runs(*common, "--reference", old / "profile.json")[0] == 0


def test_a_generation_task(tmp_path: Path, model_folder: Path, runs: Runs) -> None:
    tuned = tuned_on("llama", p=torch.randn(3, 32))
    tuned.save_pretrained(tmp_path)
    task = generation_task(input_column="text", output_column="label", prompt="p", model=str(model_folder))
    task.save(tmp_path / "p")
    record_profile(tuned, tiny_tokenizer(), task, drawn(60, 1), tmp_path / "p").save(tmp_path / "p")
    data, log = written(tmp_path / "new.jsonl", drawn(50, 2)), tmp_path / "answers.log"
    status, shown = runs("-p", tmp_path / "p", "-d", data, "--dtype", "float32")
    assert status == 0 and "margin of the first token" in shown and "loss of the responses" in shown
    run("predict", "-p", str(tmp_path / "p"), "-d", data, "--log", str(log), "--max-new-tokens", "2")
    status, shown = runs("-p", tmp_path / "p", "--log", log)
    assert status == 0 and "a log of generated text does not hold it" in shown


def test_a_row_that_cannot_be_read_is_left_out(trained: Path, tmp_path: Path, runs: Runs) -> None:
    rows = [*drawn(60, 2), {"text": "bad \ud83d", "label": "yes"}, {"text": ["fine"], "label": "yes"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, shown = runs("-p", trained / "run", "-d", data)
    assert status in (0, 1) and "2 rows of --data without readable text are left out" in shown, shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("none.jsonl", '{"text": "", "label": "yes"}\n{"text": null}\n', "--data must hold rows with text, got none"),
        ("labels.jsonl", '{"text": "film", "label": "maybe"}\n', "labels.jsonl, line 1: label 'maybe' is not among"),
        ("columns.jsonl", '{"review": "film"}\n', "the template names column 'text'"),
    ],
)
def test_rows_that_are_wrong(
    name: str, content: str, message: str, trained: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    monkeypatch.setattr("softprompt_fast.hf.loading.load_base_model", None)  # before the model is loaded
    status, shown = runs("-p", trained / "run", "-d", tmp_path / name)
    assert status == 2 and message in " ".join(shown.split()), shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data or --log must be given"),
        (["-d", "same", "--log", "same"], "give --data or --log, not both"),
        (["-d", "same", "--alpha", "2"], "--alpha must be between 0 and 1, got 2.0"),
        (["-d", "same", "--record"], "--record cannot be used without --reference"),
        (["-d", "same", "--report", "same"], "each output must be a file of its own"),
        (["-d", "same", "--report", "r.html", "--json", "r.html"], "each output must be a file of its own"),
        (["-d", "same", "--report", "same/r.html"], "same.jsonl must be a folder that can be written to"),
        (["-d", "same", "--report", "."], "an output must be a file, got the folder"),
        (["-d", "same", "--history", "same"], "--history must be a folder, got the file"),
        (["--log", "none"], "No such file"),
    ],
)
def test_options_that_are_wrong(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "same.jsonl", drawn(40, 2))
    monkeypatch.setattr("softprompt_fast.hf.loading.load_base_model", None)  # before the model is loaded
    status, shown = runs("-p", trained / "run", *(word.replace("same", "same.jsonl") for word in arguments))
    assert status == 2 and message in " ".join(shown.split()), shown


def test_a_profile_or_a_log_of_another_prompt(trained: Path, tmp_path: Path, runs: Runs) -> None:
    tuned = tuned_on("llama", prompt=torch.randn(3, 32))
    tuned.save_pretrained(tmp_path)
    shutil.copy(trained / "run" / "prompt" / "profile.json", tmp_path / "prompt")
    shutil.copy(trained / "run" / "prompt" / "task.json", tmp_path / "prompt")
    status, shown = runs("-p", tmp_path, "-d", trained / "same.jsonl")
    assert status == 2 and "the profile was recorded for prompt 'prompt'" in shown and "--reference" in shown
    log = tmp_path / "answers.log"
    run("predict", "-p", str(tmp_path), "-d", str(trained / "same.jsonl"), "--log", str(log), "--dtype", "float32")
    status, shown = runs("-p", trained / "run", "--log", log)
    assert status == 2 and "the log must hold rows of prompt 'prompt'" in shown and "got 60 rows of 'prompt'" in shown


def test_another_base_model(trained: Path, tmp_path: Path, runs: Runs) -> None:
    from support.tiny_models import build

    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    common = ["-p", trained / "run", "-d", trained / "same.jsonl", "-m", tmp_path / "other", "--dtype", "float32"]
    status, shown = runs(*common)
    assert status == 2 and "the prompt's base model must be" in shown
    assert runs(*common, "--force")[0] == 1  # its answers are others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "each output must be a file of its own, got .* twice"),
        (["--log-texts", "maybe"], "--log-texts must be yes or no, got 'maybe'"),
        (["--ensemble"], "--log cannot be combined with --ensemble"),
        (["--engine", "ray", "-o", "answers.jsonl"], "--log cannot be combined with --engine ray"),
    ],
)
def test_options_of_the_log(options: list[str], message: str, trained: Path, tmp_path: Path) -> None:
    common = ["predict", "-p", str(trained / "run"), "-d", str(trained / "same.jsonl")]
    common += ["--log", str(trained / "same.jsonl" if "twice" in message else tmp_path / "a")]
    with pytest.raises(ValueError, match=message):
        run(*common, *options)


def test_the_profile_belongs_to_the_task_on_disk(tmp_path: Path, model_folder: Path, runs: Runs) -> None:
    tuned = tuned_on("llama", p=torch.randn(3, 32))
    tuned.save_pretrained(tmp_path)
    task = classification_task(drawn(40, 0), prompt="p", model=str(model_folder))
    task.save(tmp_path / "p")
    record_profile(tuned, tiny_tokenizer(), task, drawn(60, 1), tmp_path / "p").save(tmp_path / "p")
    classification_task(drawn(40, 0), template="{text} :", prompt="p", model=str(model_folder)).save(tmp_path / "p")
    status, shown = runs("-p", tmp_path, "-d", written(tmp_path / "new.jsonl", drawn(50, 2)))
    assert status == 2 and "whose numbers or task differ" in " ".join(shown.split())
