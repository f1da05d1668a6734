"""``softprompt-fast versions`` and the commands that take versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.registry_worker import write_tiny_prompt
from support.tiny_reviews import reviews, run
from typer.testing import CliRunner

from softprompt_fast.cli.app import app
from softprompt_fast.cli.versions import register_prompts
from softprompt_fast.registry import PromptRegistry

QUICK = ["--dtype", "float32"]


def printed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Labelled rows; the test runs in their folder."""
    monkeypatch.chdir(tmp_path)
    return write_rows("rows.jsonl", reviews(64))


def write_rows(file: str, rows: list[dict[str, Any]]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train(model_folder: Path, data: str, output: str, *options: str) -> str:
    start = ["train", "-m", str(model_folder), "-d", data, "-o", output, "-b", "16", "--lr", "0.1", *QUICK]
    return run(*start, "--virtual-tokens", "4", "--name", "movies", "--register", "sentiment", *options).output


def test_from_training_to_rollback(registry: PromptRegistry, model_folder: Path, data: str, tmp_path: Path) -> None:
    assert "registered sentiment@1" in train(model_folder, data, "first", "--steps", "30")
    run("versions", "promote", "sentiment@1")
    other = {"yes": "no", "no": "yes"}
    write_rows("wrong.jsonl", [row | {"label": other[row["label"]]} for row in reviews(64)])
    assert "registered sentiment@2" in train(model_folder, "wrong.jsonl", "second", "--steps", "30")
    third = ["--steps", "4", "--init", "sentiment@production", "--lr", "1e-4"]
    assert "registered sentiment@3" in train(model_folder, data, "third", *third)
    listed = printed("versions", "list", "sentiment")
    assert [one["parent"] for one in listed] == [None, None, "sentiment@1"]  # the number, though an alias was given
    assert [one["aliases"] for one in listed] == [["production"], [], []]

    difference = printed("versions", "diff", "sentiment@production", "sentiment@2", "-d", data, *QUICK)
    assert difference["first"] == "sentiment@1" and difference["rows"] == 64
    first, second = difference["settings"]["train_rows"]
    assert first != second and "settings.steps" not in difference["settings"]
    accuracies = difference["row_scores"]["accuracy"]
    assert difference["test"]["metric"] == "accuracy" and difference["test"]["significantly_worse"]
    assert difference["test"]["worse_by"] == pytest.approx(accuracies[0] - accuracies[1])
    answers = {
        version: [json.loads(line) for line in run("predict", "-p", version, "-d", data, *QUICK).stdout.splitlines()]
        for version in ("sentiment@1", "sentiment@2")
    }
    pairs = list(zip(*answers.values(), strict=True))
    changed = [i for i, (a, b) in enumerate(pairs) if a["prediction"] != b["prediction"]]
    assert [row["row"] for row in difference["changed"]] == changed and changed
    row = difference["changed"][0]
    assert row["text"] == pairs[changed[0]][0]["text"] and row["place"] == f"rows.jsonl, line {changed[0] + 1}"

    refused = CliRunner().invoke(app, ["versions", "promote", "sentiment@2", "-d", data, *QUICK])
    assert isinstance(refused.exception, ValueError) and "its accuracy is worse than" in str(refused.exception)
    assert printed("versions", "show", "sentiment@production")["version"] == "sentiment@1"
    assert printed("versions", "promote", "sentiment@3", "-d", data, *QUICK)["forced"] == ""
    forced = printed("versions", "promote", "sentiment@2", "-d", data, "--force", *QUICK)
    assert forced["before"] == 3 and "accuracy is worse" in forced["forced"]
    assert [printed("versions", "rollback", "sentiment")["after"] for _ in range(2)] == [3, 1]
    assert printed("versions", "verify") == {"versions": 3, "faults": []}
    shown = run("versions", "list").output
    assert "rollback: sentiment@production is 1" in shown and "sentiment@3" in shown


def test_every_command_takes_versions(registry: PromptRegistry, model_folder: Path, data: str) -> None:
    train(model_folder, data, "run", "--steps", "4")
    scores = [
        json.loads(run("evaluate", "-p", prompt, "-d", data, *QUICK).stdout)
        for prompt in ("run/movies", "sentiment@latest")
    ]
    assert scores[0] == scores[1]
    run("generate", "-p", "sentiment@1", "-d", data, "-o", "a.jsonl", "--max-new-tokens", "1", *QUICK)
    run("interpret", "-p", "sentiment@1", "-o", "reading.json", *QUICK)
    assert list(json.loads(Path("reading.json").read_text())["prompts"]) == ["sentiment"]
    run("prune", "-p", "sentiment@1", "-d", data, "-o", "shorter", *QUICK)
    run("similar", "-p", "run", "--target", "sentiment@1", "-o", "near.json", *QUICK)
    run("predict", "-p", "sentiment@1", "-d", data, "-o", "b.jsonl", "--ensemble", *QUICK)
    assert run("versions", "fetch", "sentiment@1").stdout == "sentiment-1\n"
    assert json.loads(run("evaluate", "-p", "sentiment-1", "-d", data, *QUICK).stdout) == scores[0]
    assert printed("versions", "diff", "run", "sentiment@1")["same_files"]


def test_rows_without_labels_show_changed_answers(registry: PromptRegistry, model_folder: Path, data: str) -> None:
    train(model_folder, data, "run", "--steps", "8")
    train(model_folder, data, "other", "--steps", "1", "--init", "random", "--init-noise", "3")
    texts = write_rows("texts.jsonl", [{"text": row["text"]} for row in reviews(64)])
    difference = printed("versions", "diff", "sentiment@1", "sentiment@2", "-d", texts, *QUICK)
    assert difference["test"] is None and difference["row_scores"] == {} and difference["changed"]
    shown = run("versions", "diff", "sentiment@1", "sentiment@2", "-d", texts, "--show", "1", *QUICK).output
    assert f"{len(difference['changed'])} of 64 answers changed" in shown and "more; --show" in shown
    result = CliRunner().invoke(app, ["versions", "promote", "sentiment@2", "--alias", "a", "-d", texts, *QUICK])
    assert result.exit_code == 0  # nothing to compare with
    result = CliRunner().invoke(app, ["versions", "promote", "sentiment@1", "--alias", "a", "-d", texts, *QUICK])
    assert "must hold labels" in str(result.exception)


def test_a_search_registers_what_it_recommends(registry: PromptRegistry, model_folder: Path, data: str) -> None:
    start = ["search", "-m", str(model_folder), "-d", data, "-o", "out", "--steps", "12", "-b", "8", "--held-out", "20"]
    run(*start, "--lr", "0.3", "--lengths", "1,2", "--name", "mine", "--register", "sentiment", *QUICK)
    report = json.loads(Path("out/search.json").read_text())
    record = registry.get("sentiment@1").record
    chosen = report["candidates"][report["recommended"]]
    assert record.settings["num_virtual_tokens"] == chosen["num_virtual_tokens"] == record.virtual_tokens
    assert record.scores == chosen["rungs"][-1]["scores"] and record.scores_without_prompt == report["before"]
    assert record.seed == 0 and record.train_rows is not None and record.train_rows.startswith("44 rows, ")


def test_several_prompts_of_a_run_get_names_of_their_own(
    registry: PromptRegistry, model_folder: Path, data: str
) -> None:
    train(model_folder, data, "run", "--steps", "1", "--members", "2")
    assert registry.names() == ["sentiment-movies-0", "sentiment-movies-1"]
    second = registry.get("sentiment-movies-1@1").record
    assert second.scores["rows"] == 6 and second.seed == 1  # each member has a seed of its own


def test_of_several_processes_the_first_registers(
    registry: PromptRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_prompt(tmp_path / "p")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        register_prompts("sentiment", [folder])
        assert registry.names() == ([] if rank else ["sentiment"])
    assert len(registry.versions("sentiment")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-m", "m", "-d", "no.jsonl", "--register", "a b"], "a registered name must be letters"),
        (["search", "-m", "m", "-d", "no.jsonl", "--register", "a/b"], "a registered name must be letters"),
        (["train", "-m", "m", "-d", "no.jsonl", "--init", "sentiment@9"], "no prompt 'sentiment' in the registry"),
        (["predict", "-p", "sentiment@9", "-d", "rows.jsonl"], "no prompt 'sentiment' in the registry"),
        (["versions", "rollback", "p@staging", "--alias", "x"], "--alias cannot be combined with p@staging"),
        (["versions", "show", "p@7"], "no version '7' .*it has versions 1 and no alias"),
        (["versions", "fetch", "p@1", "-o", "."], "already exists; choose another folder"),
        (["versions", "list", "nothing"], "no prompt 'nothing'"),
        (["versions", "list", "--registry", "elsewhere"], "there is no registry at .*elsewhere/mlflow.db"),
        (["versions", "add", "nothing"], "no prompt was found"),
        (["versions", "diff", "p@1", "nothing"], "must be NAME@NUMBER or NAME@ALIAS"),
    ],
)
def test_errors_are_one_line(registry: PromptRegistry, data: str, arguments: list[str], message: str) -> None:
    registry.add(write_tiny_prompt(Path("p")), "p")
    result = CliRunner().invoke(app, arguments)
    with pytest.raises((LookupError, ValueError, OSError), match=message) as raised:
        raise result.exception or AssertionError(result.output)
    assert "\n" not in str(raised.value)


def test_verify_gives_status_1_for_altered_files(registry: PromptRegistry, data: str) -> None:
    registry.add(write_tiny_prompt(Path("p")), "p")
    (registry.fetch("p@1") / "task.json").unlink()
    result = CliRunner().invoke(app, ["versions", "verify"])
    assert result.exit_code == 1 and result.stdout.startswith("p@1: the files in ")
