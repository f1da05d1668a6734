"""The lines of progress where the output is not a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.base import progress
from softprompt_fast.tasks.task import classification_task
from softprompt_fast.tuning.progress import clock
from softprompt_fast.tuning.run import tune


def lines_of_a_run(folder: Path) -> list[str]:
    rows = reviews()
    out = io.StringIO()
    tune(
        spf.SoftPromptModel(build("llama")),
        tiny_tokenizer(),
        classification_task(rows),
        rows[16:],
        rows[:16],
        folder,
        num_virtual_tokens=2,
        steps=4,
        batch_size=8,
        eval_every=2,
        console=Console(file=out, width=60),  # a narrow pipe breaks no line
    )
    return out.getvalue().splitlines()


def test_lines_show_step_loss_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines = [line for line in lines_of_a_run(tmp_path) if line.startswith("step ")]
    number = r"step (\d)/4: loss \d\.\d{3}, [\d,]+ tokens/s, (\d+ min )?\d+ s left"
    steps = [match[1] for line in lines if (match := re.fullmatch(number, line))]
    # The loss is logged after the line of its step.
    assert steps == ["2", "3", "4"]
    assert re.fullmatch(r"step 1/4: [\d,]+ tokens/s", lines[0])
    assert lines[-2].endswith(" 0 s left")
    assert sum("held-out accuracy" in line for line in lines) == 2


def test_lines_are_seconds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 1000.0)
    lines = [line for line in lines_of_a_run(tmp_path) if re.match(r"step \d/4", line)]
    assert len(lines) == 1 and lines[0].startswith("step 1/4")


def test_time_is_written_in_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.4, 59.6, 125, 3600)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "2 min 05 s",
        "60 min 00 s",
    ]
