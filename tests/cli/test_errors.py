"""Whatever goes wrong is one line and a status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softprompt_fast import cli
from softprompt_fast.cli.app import app, main

Fails = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs ``build`` with a build that raises; gives the status and what was shown."""

    def start(error: BaseException) -> tuple[int, str]:
        def load(**_: Any) -> Any:
            raise error

        monkeypatch.setattr("softprompt_fast.ops.extension.build.load", load)
        monkeypatch.setattr(sys, "argv", ["softprompt-fast", "build"])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(str(stop.value.code)), capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("`x` must be 1"), "error: `x` must be 1"),
        (ValueError("two\n  lines"), "error: two lines"),
        (KeyError("no prompt 'a'"), "error: no prompt 'a'"),
        (FileExistsError("run already exists; choose another"), "error: run already exists; choose another"),
        (RuntimeError("broken"), "error: RuntimeError: broken (SOFTPROMPT_FAST_TRACEBACK=1 shows"),
        (AssertionError(), "error: AssertionError: "),
        (ValueError("[bold]not markup"), "error: [bold]not markup"),
    ],
)
def test_an_error_is_one_line(fails: Fails, error: Exception, message: str) -> None:
    status, shown = fails(error)
    assert status == 1 and shown.startswith(message) and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    ],
)
def test_out_of_memory_says_what_to_reduce(fails: Fails, error: Exception) -> None:
    status, shown = fails(error)
    assert status == 1 and shown.count("\n") == 1
    assert shown.startswith("error: out of memory; use a smaller --batch-size or --max-length")


def test_what_the_allocator_really_raises_is_out_of_memory(fails: Fails) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert "out of memory" in fails(raised.value)[1]


def test_ctrl_c_is_one_line(fails: Fails) -> None:
    assert fails(KeyboardInterrupt()) == (130, "interrupted\n")


def test_the_traceback_is_there_for_whoever_asks(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_FAST_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError("x"))


def test_the_package_exports_the_app() -> None:
    assert cli.app is app and cli.main is main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: Missing option '--model' / '-m'. See softprompt-fast train --help."),
        (["info", "--nonsense"], "error: No such option: --nonsense"),
        (["prune", "-p", "a", "-d", "b", "-o", "c", "--min-tokens", "0"], "error: Invalid value for '--min-tokens'"),
        (["nothing"], "error: No such command 'nothing'. See softprompt-fast --help."),
    ],
)
def test_an_error_of_usage_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["softprompt-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith(message) and shown.count("\n") == 1
