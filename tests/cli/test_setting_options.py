"""Options that are made from dataclass fields: defaults, texts and rules are those of the dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import typer
from support.tiny_reviews import run
from typer.testing import CliRunner

from softprompt_fast.base.fields import POSITIVE_INTEGER, check_fields, described, descriptions
from softprompt_fast.cli.app import app
from softprompt_fast.cli.data import TaskOptions
from softprompt_fast.cli.options import options_of, with_options
from softprompt_fast.cli.search import NOT_SEARCHED
from softprompt_fast.tuning.settings import TuningSettings

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SHORTER = {"num_virtual_tokens": "--virtual-tokens", "gradient_accumulation_steps": "--accumulate", "kind": "--task"}


def option(command: str, name: str) -> Any:
    return next(parameter for parameter in COMMANDS[command].params if parameter.name == name)


@pytest.mark.parametrize("group", [TuningSettings, TaskOptions])
def test_every_field_is_described(group: type) -> None:
    about = {one.name: description for one, description in descriptions(group)}
    assert list(about) == [one.name for one in fields(group)]
    assert all(description.help.endswith((".", ").")) and description.group for description in about.values())


@pytest.mark.parametrize("name", [one.name for one in fields(TuningSettings)])
@pytest.mark.parametrize("command", ["train", "search"])
def test_options_are_the_settings(command: str, name: str) -> None:
    if command == "search" and name in NOT_SEARCHED:
        assert name == "steps" or all(parameter.name != name for parameter in COMMANDS["search"].params)
        return
    made = option(command, name)
    assert made.default == getattr(TuningSettings(), name)
    assert SHORTER.get(name, f"--{name.replace('_', '-')}") in made.opts


@pytest.mark.parametrize("command", ["analyze", "train", "search", "compare", "similar"])
def test_tasks_are_described_by_the_same_options(command: str) -> None:
    for one in fields(TaskOptions):
        made = option(command, one.name)
        assert made.default == one.default
        assert SHORTER.get(one.name, f"--{one.name.replace('_', '-')}") in made.opts


def test_options_can_be_chosen() -> None:
    assert [p.name for p in options_of(TuningSettings, only=("seed", "init"))] == ["init", "seed"]
    assert "seed" not in [p.name for p in options_of(TuningSettings, without=("seed",))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["--steps", "0"], "--steps must be a positive integer, got 0"),
        (["--lr", "0"], "--learning-rate must be positive and finite, got 0.0"),
        (["--accumulate", "0"], "--accumulate must be a positive integer, got 0"),
        (["-P", "-1"], "--virtual-tokens must be a positive integer, got -1"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, got 1.0"),
        (["--schedule", "step"], "--schedule must be one of cosine, linear, constant, got 'step'"),
        (["--steps", "3", "--epochs", "1"], "--steps cannot be combined with --epochs; give one of them"),
        (["--max-length", "0"], "--max-length must be a positive integer, got 0"),
        (["--task", "regression"], "--task must be one of classification, generation, got 'regression'"),
    ],
)
def test_a_value_out_of_range_names_its_option(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", "-m", "no-model", "-d", "no-data.jsonl", *arguments])
    assert isinstance(result.exception, ValueError) and str(result.exception) == message


def test_old_names_of_columns_are_gone() -> None:
    for command, old in (("train", "--prompt-column"), ("train", "--response-column"), ("predict", "--prompt-column")):
        assert all(old not in parameter.opts for parameter in COMMANDS[command].params)


def test_a_command_gets_a_function_that_makes_the_dataclass() -> None:
    @dataclass(frozen=True)
    class Size:
        width: int = field(default=3, metadata=described("Width.", POSITIVE_INTEGER, group="Size", flags=("--wide",)))
        height: int | None = field(default=None, metadata=described("Height.", POSITIVE_INTEGER, group="Size"))

        def __post_init__(self) -> None:
            check_fields(self)

    made: list[Any] = []

    def command(first: str, size: Any, last: int = 1) -> None:
        made.extend([first, last, size(), size(height=5)])

    command.__annotations__["size"] = object
    tiny = typer.Typer()
    tiny.command()(with_options("size", Size)(command))
    result = CliRunner().invoke(tiny, ["--wide", "4", "x"], catch_exceptions=False)
    assert result.exit_code == 0 and made == ["x", 1, Size(4), Size(4, 5)]
    result = CliRunner().invoke(tiny, ["--wide", "0", "x"])
    assert str(result.exception) == "--wide must be a positive integer, got 0"


def test_data_columns_are_named_on_the_command_line(tmp_path: Any) -> None:
    from softprompt_fast.cli.data import label_words

    task = TaskOptions(kind="generation", input_column="question", output_column="answer").task([], prompt="p")
    assert (task.template, task.target_column, task.prompt) == ("{question}", "answer", "p")
    task = TaskOptions(template=r"{text}\nGood?", label_word=["a=yes", "b= no"]).task([{"text": "x", "label": "a"}])
    assert task.template == "{text}\nGood?" and task.label_words == {"a": " yes", "b": " no"}
    with pytest.raises(ValueError, match="--label-word must be LABEL=WORD, got 'a'"):
        label_words(["a"])


def test_the_help_of_settings_names_options() -> None:
    assert "--epochs" in option("train", "steps").help and "`" not in run("train", "--help").output
