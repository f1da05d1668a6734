"""The studies of compression run, with few steps on a small model, and their rows are those of the results."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, queries

from softprompt_fast import distillation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOCUMENTS = ("fair", "kettle", "library", "trail")
SMALL = ["--seeds", "0", "1", "--steps", "2", "--queries", "8", "--held-out", "4", "--set", "batch_size=4"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a study with the small model, and with these of its names replaced; returns the rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("softprompt_fast.hf.load_base_model", lambda *_: (build("llama"), tiny_tokenizer()))

    def started(name: str, arguments: list[str], **names: Any) -> list[dict[str, str]]:
        module = importlib.import_module(name)
        for key, value in names.items():
            monkeypatch.setattr(module, key, value)
        monkeypatch.setattr(sys, "argv", [name, "--csv", str(tmp_path / "rows.csv"), *arguments])
        module.main()
        with open(tmp_path / "rows.csv") as file:
            return list(csv.DictReader(file))

    return started


def columns(file: str) -> list[str]:
    return (BENCHMARKS / "results" / file).read_text().splitlines()[0].split(",")


def given(_: str, held_out: int, shown: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = queries(20)[shown:]
    return rows[held_out:], rows[:held_out]


def test_queries_that_the_model_makes_come_before_given_ones(run: Any) -> None:
    names = {"text_of": lambda _: {"text": TEXT, "template": TEMPLATE}, "FORMS": {"kv": 4}, "given_queries": given}
    made = {"self_made": lambda *_: [{"text": f"very {word}"} for word in ("great", "dull", "fine")]}
    rows = run("study_compress", ["--forms", "kv", "--self-made", "3", *SMALL], **names, **made)
    assert list(rows[0]) == columns("compress_cpu.csv")
    assert [row["in_front"] for row in rows] == [
        *("whole text", "nothing", "text cut", "mean-pooled"),
        *["4 keys and values"] * 2,
    ]
    assert {(row["queries"], row["self_made"], row["held_out"]) for row in rows} == {("5", "3", "4")}
    assert [row["seed"] for row in rows] == ["0"] * 5 + ["1"]


def test_an_edited_text_is_trained_from_the_old_prompt_and_from_new_values(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = distillation.compress, []

    def recorded(model: Any, tokenizer: Any, text: str, output: Path, *more: Any, **options: Any) -> Any:
        calls.append((text, output, options.get("init")))
        return original(model, tokenizer, text, output, *more, **options)

    monkeypatch.setattr(distillation, "compress", recorded)
    small = ["--tokens", "4", "--before", "3", "--warm", "1", "--steps", "2", "--queries", "8", "--held-out", "4"]
    words = ["great", "dull", "fine", "bad", "good"]
    names = {
        "example": lambda place: f"film very {words[place % 5]} Label : yes ",
        "INSTRUCTION": "film plot ",
        "TEMPLATE": TEMPLATE,
        "given_queries": given,
    }
    rows = run("study_warm_start", small, **names)
    assert [(row["start"], row["steps"]) for row in rows] == [("old prompt", "1"), ("new", "2")]
    (text, before, init), (edited, _, old), (again, _, new) = calls
    assert init is None and old == before / "prompt" and new is None
    assert text != edited == again
    assert float(rows[0]["kl"]) > 0 and rows[0]["steps_before"] == "3"


def test_documents_apart_and_beside_each_other(run: Any, tmp_path: Path) -> None:
    for i, name in enumerate(DOCUMENTS):
        (tmp_path / f"{name}.txt").write_text(["great", "dull", "fine", "bad"][i] + " film plot" * 3)
    small = ["--tokens", "4", "--steps", "2", "--new-tokens", "3", "--held-out", "4", "--queries", "12"]
    rows = run("study_documents", [*small, "--beside", "0", "1"], queries=documents_queries, TEXTS=tmp_path)
    assert list(rows[0]) == columns("documents_cpu.csv")
    assert [(row["beside_in_training"], row["measured"]) for row in rows[::3]] == [
        *(("0", "alone"), ("0", "together")),
        *(("1", "alone"), ("1", "together")),
    ]


def documents_queries(held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = [row | {"document": DOCUMENTS[i % 4]} for i, row in enumerate(queries(16))]
    return rows[held_out:], rows[:held_out]
