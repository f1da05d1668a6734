"""Versions hold what was added, cannot be changed unnoticed, and are found by number, alias and name."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from support.registry_worker import TASK, write_tiny_prompt
from support.tiny_tuning import tune_tiny

from softprompt_fast.prompts import write_prompt
from softprompt_fast.registry import PromptRegistry
from softprompt_fast.registry.history import Move, promoted
from softprompt_fast.registry.record import RECORD_FILE, describe, faults, write_record


def test_a_version_holds_the_facts_of_its_run(registry: PromptRegistry, tmp_path: Path) -> None:
    tune_tiny(tmp_path / "run", seed=3)
    version = registry.add(tmp_path / "run", "sentiment", alias="production", description="the first")
    record = version.record
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert str(version) == "sentiment@1" and version.aliases == ("production",)
    assert record.settings == metrics["settings"] and record.seed == 3
    assert record.scores == metrics["after"] and record.scores_without_prompt == metrics["before"]
    assert {"accuracy", "accuracy_low", "accuracy_high"} <= set(record.scores)
    assert (record.train_rows or "").startswith("8 rows, ") and (record.held_out_rows or "").startswith("4 rows, ")
    assert record.base_fingerprint is not None and record.base_fingerprint.startswith("llama-3x32:")
    assert record.libraries["torch"] == torch.__version__ and record.author and record.added.endswith("+00:00")
    assert record.method == "PROMPT_TUNING" and record.virtual_tokens == 4 and record.description == "the first"
    assert registry.get("sentiment@production") == registry.get("sentiment@latest") == version


def test_a_moved_prompt_and_one_of_another_run_get_no_foreign_scores(registry: PromptRegistry, tmp_path: Path) -> None:
    tune_tiny(tmp_path / "run")
    write_tiny_prompt(tmp_path / "run" / "other")
    assert registry.add(tmp_path / "run" / "other", "other").record.scores == {}
    assert registry.add(tmp_path / "run" / "p", "own").record.scores != {}
    (tmp_path / "run" / "p").rename(tmp_path / "p")
    assert registry.add(tmp_path / "p", "moved").record.scores == {}


def test_a_version_is_a_copy(registry: PromptRegistry, tmp_path: Path) -> None:
    folder = write_tiny_prompt(tmp_path / "p", 1.0)
    (folder / "linked.json").symlink_to(write_tiny_prompt(tmp_path / "other") / "task.json")
    version = registry.add(folder, "sentiment")
    stored = registry.fetch("sentiment@1")
    before = {file.name: file.read_bytes() for file in stored.iterdir()}
    write_tiny_prompt(folder, 2.0)
    (tmp_path / "other" / "task.json").write_text("{}")
    assert {file.name: file.read_bytes() for file in stored.iterdir()} == before
    assert registry.verify() == [] and not (stored / "linked.json").is_symlink()
    own = registry.fetch("sentiment@1", tmp_path / "mine")
    (own / "task.json").write_text("{}")  # a fetched copy can be changed, which changes no version
    assert registry.verify() == [] and registry.get("sentiment@1") == version
    with pytest.raises(FileExistsError, match="already exists; choose another folder"):
        registry.fetch("sentiment@1", tmp_path / "mine")


def test_a_record_of_an_older_library_is_no_fault(tmp_path: Path) -> None:
    folder = write_tiny_prompt(tmp_path / "p")
    record = describe(folder, folder, "p", parent=None, description="")
    write_record(folder, record)
    stored = json.loads((folder / RECORD_FILE).read_text())
    del stored["description"]  # a field that came later
    (folder / RECORD_FILE).write_text(json.dumps(stored | {"later": 1}))
    assert faults(folder, record) == []
    (folder / RECORD_FILE).write_text(json.dumps(stored | {"author": "somebody else"}))
    assert len(faults(folder, record)) == 1


@pytest.mark.parametrize("fault", ["changed", "missing", "more", "record", "folder"])
def test_altered_files_are_found_and_refused(registry: PromptRegistry, tmp_path: Path, fault: str) -> None:
    registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", alias="production")
    registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", alias="production")
    folder = registry.fetch("sentiment@1")
    file = folder / {"record": "version.json"}.get(fault, "adapter_model.safetensors")
    for one in folder.iterdir():
        one.chmod(0o644)
    if fault in ("changed", "record"):
        file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    elif fault == "missing":
        file.unlink()
    elif fault == "more":
        (folder / "more.txt").write_text("more")
    else:
        folder.rename(folder.with_name("elsewhere"))
    (found,) = registry.verify()
    assert found.startswith("sentiment@1: ")
    for use in (registry.fetch, registry.promote):
        with pytest.raises(ValueError, match="sentiment@1 cannot be used: "):
            use("sentiment@1")
    with pytest.raises(ValueError, match="sentiment@1 cannot be used: "):
        registry.rollback("sentiment")
    assert registry.get("sentiment@production").number == 2


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        ("sentimnt@1", LookupError, "no prompt 'sentimnt' in the registry .*did you mean 'sentiment'"),
        ("sentiment@8", LookupError, "no version '8' .*it has versions 1 to 2 and aliases production"),
        ("sentiment@99999999999999999999", LookupError, "no version '99999999999999999999'"),
        ("sentiment@0", LookupError, "no version '0'"),
        ("sentiment@prodution", LookupError, "did you mean 'production'"),
        ("sentiment", ValueError, "must be NAME@NUMBER or NAME@ALIAS, .*got 'sentiment'"),
        ("a/b@1", ValueError, "must be NAME@NUMBER"),
        ("sentiment@1 ", ValueError, "must be NAME@NUMBER"),
    ],
)
def test_unknown_versions(
    registry: PromptRegistry, tmp_path: Path, version: str, error: type[Exception], message: str
) -> None:
    registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", alias="production")
    registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment")
    for use in (registry.get, registry.fetch, registry.promote):
        with pytest.raises(error, match=message):
            use(version)


@pytest.mark.parametrize("name", ["", "two words", "a/b", "a@b", "-a", "ü", "a" * 129])
def test_names_that_are_not_allowed(registry: PromptRegistry, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a registered name must be letters, digits, '_' and '-', got"):
        registry.add(write_tiny_prompt(tmp_path / "p"), name)
    assert registry.names() == []


@pytest.mark.parametrize("alias", ["7", "v7", "latest", "Latest", "two words", "a/b", ""])
def test_aliases_that_are_not_allowed(registry: PromptRegistry, tmp_path: Path, alias: str) -> None:
    folder = write_tiny_prompt(tmp_path / "p")
    registry.add(folder, "sentiment")
    for use in (lambda: registry.add(folder, "sentiment", alias=alias), lambda: registry.promote("sentiment@1", alias)):
        with pytest.raises(ValueError, match="an alias must be letters, digits, '_' and '-', and not a number"):
            use()
    assert len(registry.versions("sentiment")) == 1


def test_folders_that_cannot_become_versions(registry: PromptRegistry, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no prompt was found"):
        registry.add(tmp_path / "nothing", "sentiment")
    write_tiny_prompt(tmp_path / "several" / "a")
    write_tiny_prompt(tmp_path / "several" / "b")
    with pytest.raises(ValueError, match=r"must be one prompt, got .*several with a, b; add each by its folder"):
        registry.add(tmp_path / "several", "sentiment")
    write_prompt(tmp_path / "bare", torch.zeros(2, 4), {})
    with pytest.raises(FileNotFoundError, match=r"must hold a task\.json"):
        registry.add(tmp_path / "bare", "sentiment")
    with pytest.raises(LookupError, match="no prompt 'sentiment'"):
        registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", parent="sentiment@1")
    assert registry.names() == []
    assert registry.add(tmp_path / "bare", "sentiment", task=TASK).record.base_fingerprint is None
    assert (registry.fetch("sentiment@1") / "task.json").is_file()
    with pytest.raises(ValueError, match="`task` cannot be given"):
        registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", task=TASK)


def test_rollback_goes_back_step_by_step_and_is_recorded(registry: PromptRegistry, tmp_path: Path) -> None:
    for value in range(4):
        registry.add(write_tiny_prompt(tmp_path / "p", value), "sentiment")
        registry.promote(f"sentiment@{value + 1}")
    with pytest.raises(ValueError, match="sentiment@production is version 4 already"):
        registry.promote("sentiment@4")
    assert [registry.rollback("sentiment").after for _ in range(2)] == [3, 2]
    registry.promote("sentiment@4")
    assert [registry.rollback("sentiment").after for _ in range(2)] == [2, 1]
    with pytest.raises(LookupError, match="sentiment@production is version 1, and no earlier version is recorded"):
        registry.rollback("sentiment")
    history = registry.history("sentiment")
    assert [move.action for move in history] == ["promote"] * 4 + ["rollback"] * 2 + ["promote"] + ["rollback"] * 2
    assert all(move.author and move.at for move in history)
    with pytest.raises(LookupError, match="has no alias 'staging'"):
        registry.rollback("sentiment", "staging")


def moved(action: str, before: int | None, after: int) -> Move:
    return Move(action, "sentiment", "production", before, after, "me", "now")


@pytest.mark.parametrize(
    ("moves", "current", "stack"),
    [
        ([], 3, [3]),
        ([moved("promote", None, 1), moved("promote", 1, 2)], 2, [1, 2]),
        ([moved("promote", None, 1)], 2, [1, 2]),  # moved to 2 elsewhere, or killed before the record
        ([moved("promote", None, 1), moved("promote", 1, 2)], 1, [1]),  # a rollback without its record
        ([moved("promote", None, 1), moved("promote", 5, 2)], 2, [1, 5, 2]),
        ([moved("promote", None, 1), moved("promote", 1, 2), moved("rollback", 2, 1)], 1, [1]),
    ],
)
def test_what_the_alias_really_named_counts(moves: list[Move], current: int, stack: list[int]) -> None:
    assert promoted(moves, current) == stack


def test_a_version_on_another_base_is_promoted_by_force_only(registry: PromptRegistry, tmp_path: Path) -> None:
    registry.add(write_tiny_prompt(tmp_path / "p"), "sentiment", alias="production")
    registry.add(write_tiny_prompt(tmp_path / "q", base_fingerprint="llama-3x32:9999:4567"), "sentiment")
    with pytest.raises(ValueError, match=r"its base model 'tiny' .*9999.* is not that of sentiment@1.*--force"):
        registry.promote("sentiment@2")
    assert registry.get("sentiment@production").number == 1
    move = registry.promote("sentiment@2", force=True)
    assert move.after == 2 and "base model" in registry.history("sentiment")[-1].forced


def test_registries_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(FileNotFoundError, match=f"there is no registry at {tmp_path}/mlflow.db; "):
        PromptRegistry().names()
    assert list(tmp_path.iterdir()) == []  # a question makes nothing
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="must be in a folder that can be written"):
        PromptRegistry(tmp_path / "file").add(write_tiny_prompt(tmp_path / "p"), "sentiment")
    with socket.socket() as taken:  # it accepts connections and never says anything
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start = time.perf_counter()
        with pytest.raises(ConnectionError, match="must be an MLflow server that answers: timed out"):
            PromptRegistry(address := f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ConnectionError, match="Connection refused"):
        PromptRegistry(address)
    assert time.perf_counter() - start < 20
