"""The demo on a tiny model and tiny reviews: what it prints, in which order, and what it writes."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

from softprompt_fast import demo
from softprompt_fast.base import progress


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"text": f"{row['text']} {i}", "rating": 1.0} for i, row in enumerate(reviews(400))]
    for row in rows:
        row["label"] = "positive" if row["label"] == "yes" else "negative"
    monkeypatch.setattr(demo, "sentiment_rows", lambda domain: rows)
    monkeypatch.setattr(demo, "LABEL_WORDS", {"negative": " no", "positive": " yes"})
    monkeypatch.setattr(demo, "VALIDATION_ROWS", 20)
    monkeypatch.setattr(demo, "VIRTUAL_TOKENS", 4)
    monkeypatch.setattr(demo, "load_base_model", lambda *_, **__: (build("llama"), tiny_tokenizer()))


def test_the_demo_says_what_comes_and_scores_other_rows(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    out = io.StringIO()
    metrics = demo.run_demo(tmp_path / "run", steps=4, seed=0, held_out=60, console=Console(file=out, width=60))
    lines = out.getvalue().splitlines()
    starts = [
        "SmolLM2-135M learns",
        "  1. load",
        "  2. tune",
        "  3. score",
        "model ready",
        "without a prompt",
        "step 1/4",
    ]
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert places == sorted(places) and places[:4] == [0, 1, 2, 3]
    assert "for 4 steps" in lines[2] and "60 held-out reviews" in lines[3]
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["rows_before"], metrics["rows"], metrics["settings"]["steps"]) == (20, 60, 4)
    summary = capsys.readouterr().out
    assert "(20 reviews)" in summary and "(60 other reviews)" in summary
    assert f'add_directory("{tmp_path / "run"}")' in summary


def test_the_program_that_the_demo_prints_classifies(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run_demo(tmp_path / "demo", steps=2, seed=0, held_out=20, console=Console(file=io.StringIO()))
    program = "\n".join(line[2:] for line in capsys.readouterr().out.split("Use it:\n")[1].splitlines())
    monkeypatch.setattr("softprompt_fast.hf.load_base_model", lambda _: (build("llama"), tiny_tokenizer()))
    exec(program, {})
    assert "'prediction': " in capsys.readouterr().out


def test_the_extension_compiles_while_the_model_loads(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = threading.Event()
    load, state = demo.load_base_model, demo.backend.state

    def begin_to_load(*given: Any, **more: Any) -> Any:
        loading.set()
        return load(*given, **more)

    def compile_slowly() -> Any:
        assert loading.wait(60), "the model must load before the extension is ready"
        return state()

    monkeypatch.setattr(demo, "load_base_model", begin_to_load)
    monkeypatch.setattr(demo.backend, "state", compile_slowly)
    demo.run_demo(tmp_path / "run", steps=1, seed=0, held_out=20, console=Console(file=io.StringIO()))
    assert loading.is_set()


def test_the_rows_that_choose_and_the_rows_that_score_are_not_trained_on() -> None:
    rows = [{"text": str(i % 90), "label": "negative" if i % 2 else "positive"} for i in range(100)]
    train, held_out = demo.balanced(rows, 20, 0)
    texts = {row["text"] for row in held_out}
    assert len(held_out) == len(texts) == 20 and not texts & {row["text"] for row in train}
    assert sum(row["label"] == "negative" for row in held_out) == 10
