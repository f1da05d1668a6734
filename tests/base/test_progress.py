"""Progress over rows without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from softprompt_fast.base import progress


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.progress_bar(30, Console(file=out)) as advance:
        for _ in range(3):
            advance(10)
    assert out.getvalue().splitlines() == ["10/30 rows", "20/30 rows", "30/30 rows"]


def test_short_work_prints_no_line() -> None:
    out = io.StringIO()
    with progress.progress_bar(30, Console(file=out)) as advance:
        advance(30)
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with progress.progress_bar(30, Console(file=out, force_terminal=True)) as advance:
        advance(30)
    assert "100%" in out.getvalue()
