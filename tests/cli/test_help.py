"""The help of the command line: its groups, a text for every option, and how fast it is there."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer
from support.commands import every_command
from support.tiny_reviews import run

from softprompt_fast.base.version import __version__
from softprompt_fast.cli.app import GROUPS, app

COMMANDS = every_command(typer.main.get_command(app))
LONG = ["analyze", "train", "search", "compare", "compress", "evaluate", "predict", "generate"]
LONG += ["interpret", "monitor", "prune", "similar"]


def shown(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    return str(run(*arguments, "--help").output)


def test_commands_are_listed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch=monkeypatch)
    groups = {
        "Start": ["demo", "info"],
        "Tune": ["analyze", "train", "search", "compare", "compress"],
        "Use": ["evaluate", "predict", "generate"],
        "Production": ["versions", "monitor"],
        "Understand": ["interpret", "prune", "similar"],
        "Extension": ["build", "clean"],
    }
    lines = [line.strip("│╭─ ") for line in text[text.index("─ Start ─") - 2 :].splitlines()]
    expected = [word for heading, names in groups.items() for word in (heading, *names)]
    assert [line.split()[0] for line in lines if line and line.split()[0] in expected] == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_text(name: str) -> None:
    command: Any = COMMANDS[name]
    assert command.help and command.help.endswith(".")
    for parameter in command.params:
        assert parameter.help and parameter.help.rstrip(")").endswith("."), f"{name} {parameter.opts[0]}"
        assert not parameter.help.startswith(("Of ", "What ", "Those ", "That ")), f"{name} {parameter.opts[0]}"


@pytest.mark.parametrize("name", LONG)
def test_long_commands_show_options_in_groups_and_end_with_two_examples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(name, monkeypatch=monkeypatch)
    assert "Machine" in text and text.index("─ Machine ─") < text.index("Examples:")
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"softprompt-fast {name} ")]
    assert len(examples) == 2


WITHOUT_DATA = ("compress", "interpret", "join", "monitor", "push", "similar")


def examples() -> list[list[str]]:
    every = [line for commands in GROUPS.values() for lines in commands.values() for line in lines]
    return [line.split()[1:] for line in every]


@pytest.mark.parametrize("arguments", examples(), ids=" ".join)
def test_examples_use_options_that_exist(arguments: list[str]) -> None:
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    context = COMMANDS[name].make_context(name, rest)
    without_data = name.startswith("versions ") or name in WITHOUT_DATA
    assert without_data or context.params["data"] is not None


def test_the_version_is_shown() -> None:
    assert run("--version").output == f"softprompt-fast {__version__}\n"


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in shown(monkeypatch=monkeypatch)


def test_choices_are_completed() -> None:
    option = next(parameter for parameter in COMMANDS["train"].params if parameter.name == "schedule")
    items = option.shell_complete(COMMANDS["train"].make_context("train", [], resilient_parsing=True), "c")
    assert {item.value for item in items} >= {"cosine", "constant"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["versions", "--help"]])
def test_help_waits_for_no_large_package(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from softprompt_fast.cli import app\n"
        f"result = CliRunner().invoke(app, {arguments!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'mlflow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
