"""Commands to copy after a run, with its paths."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

PROGRAM = "softprompt-fast"


def command_line(*words: object) -> str:
    """A command with every word quoted as a shell needs it."""
    return shlex.join([PROGRAM, *map(str, words)])


def given_options(context: Any) -> dict[str, Any]:
    """The options that were given on the command line: the name with its dashes, and the value."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[parameter.name]
            off = value is False and parameter.secondary_opts
            given[parameter.secondary_opts[0] if off else parameter.opts[0]] = True if off else value
    return given


def words_of(options: Mapping[str, Any]) -> list[str]:
    """The words that give these options on a command line."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(name)
        elif isinstance(value, list | tuple):
            words += [word for one in value for word in (name, str(one))]
        elif value is not None and value is not False:
            words += [name, str(value)]
    return words


def after_training(given: Mapping[str, Any], results: list[Any], *, prompt: str, more: Mapping[str, Any]) -> list[str]:
    """The commands to evaluate, to predict and to continue training.

    Args:
        given: the options of this run, see :func:`given_options`.
        results: of this run, one for each prompt.
        prompt: folder of the prompts.
        more: options of ``evaluate`` and ``predict`` that depend on the kind of run.
    """
    kept = ("--adapter", "--split", "--dtype", "--quantize", "--device")
    common = {name: given[name] for name in kept if name in given}
    scored = given.get("--validation") or given["--data"]
    ensemble = bool(more["--ensemble"])
    one = prompt if ensemble else results[0].folder  # tasks are scored one by one
    evaluate = ["evaluate", *words_of({"--prompt": one, "--data": scored, "--ensemble": ensemble} | common)]
    answers = results[0].folder.parent / "answers.jsonl"
    predict = ["predict", *words_of({"--prompt": prompt, "--data": scored, "--output": answers} | dict(more) | common)]
    longer: dict[str, Any] = {"--resume": True}
    if not results[0].interrupted:
        longer |= {"--epochs": 2 * given["--epochs"]} if "--epochs" in given else {"--steps": 2 * results[0].steps}
    proceed = ["train", *words_of(dict(given) | longer)]
    return [command_line(*words) for words in (evaluate, predict, proceed)]
