"""A missing optional package is reported before any work starts, with the command that installs it."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from softprompt_fast.base.extras import require
from softprompt_fast.cli.app import app


def test_only_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require("train", "json", purpose="a test")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError) as raised:
        require("train", "json", "no_such_package", "sklearn", purpose="a test")
    assert str(raised.value) == 'a test needs no_such_package, scikit-learn: pip install "softprompt_fast[train]"'


ROWS = ["-d", "no-such-file.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "package", "message"),
    [
        (["train", "-m", "m", *ROWS], "accelerate", r"train needs accelerate: .*softprompt_fast\[train\]"),
        (["train", "-m", "m", *ROWS, "--tensorboard"], "tensorboard", "--tensorboard needs tensorboard"),
        (["analyze", "-m", "m", *ROWS], "sklearn", "analyze needs scikit-learn"),
        (["analyze", "-m", "m", *ROWS, "--figure", "a.svg"], "matplotlib", "--figure needs matplotlib"),
        (["search", "-m", "m", *ROWS], "optuna", r"a search needs Optuna: .*softprompt_fast\[search\]"),
        (["compare", "-m", "m", *ROWS], "peft", r"compare needs PEFT: .*softprompt_fast\[compare\]"),
        (["predict", "-p", "p", *ROWS, "-o", "a.csv", "--engine", "ray"], "ray", r"Ray: .*softprompt_fast\[ray\]"),
        (["generate", "-p", "p", *ROWS, "-o", "a.parquet"], "pyarrow", "writing a.parquet needs pyarrow"),
        (["predict", "-p", "p", *ROWS], "datasets", "reading data needs datasets"),
        (["versions", "list"], "mlflow", r"versions needs MLflow: .*softprompt_fast\[production\]"),
        (["train", "-m", "m", *ROWS, "--register", "a"], "mlflow", "--register needs MLflow"),
        (["predict", "-p", "a@1", *ROWS], "mlflow", "the registry needs MLflow"),
        (["demo"], "gguf", r"the demo needs gguf: .*softprompt_fast\[demo\]"),
    ],
)
def test_a_missing_package_is_reported_first(
    arguments: list[str], package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, arguments)
    with pytest.raises(ImportError, match=message):
        raise result.exception or AssertionError(result.output)


def test_a_package_is_not_asked_for_if_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "optuna", "ray", "tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    for arguments in (["compare", "-m", "m", *ROWS, "--methods", "prompt,full"], ["train", "-m", "m", *ROWS]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, FileNotFoundError), result.exception
