"""Options that several commands share, and options made from the fields of a dataclass."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.fields import descriptions
from ..base.figures import check_figure_path

DATA, PROMPT, TRAINING, OUTPUT, MACHINE = "Data", "Prompt", "Training", "Output", "Machine"
"""Headings in the help of a command; what a command cannot do without has none."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def completion(choices: tuple[str, ...]) -> Callable[[], list[str]] | None:
    """What the shell offers for an option."""
    return (lambda: list(choices)) if choices else None


Model = Annotated[str, typer.Option("--model", "-m", help="Folder or Hub name of the base model.")]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Base model. By default the one that the prompt was tuned on."),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="Rows: a jsonl, json, csv, tsv or parquet file, a folder of them, or a Hub dataset."
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="Labelled rows: a jsonl, json, csv, tsv or parquet file, a folder of them, or a Hub dataset.",
    ),
]
PromptFolder = Annotated[
    Path,
    typer.Option(
        "--prompt",
        "-p",
        help="Folder of a prompt, output folder of a run with one prompt, a version such as NAME@production, or a Hub "
        "repository such as USER/NAME.",
    ),
]
PromptFolders = Annotated[
    Path,
    typer.Option(
        "--prompt",
        "-p",
        help="Folder of a prompt or of several, a version such as NAME@production, or a Hub repository such as "
        "USER/NAME.",
    ),
]
SplitSeed = Annotated[int, typer.Option(help="Seed that splits the data.", rich_help_panel=DATA)]
Validation = Annotated[
    str | None,
    typer.Option(help="Held-out rows, a file or a Hub dataset. By default a part of --data.", rich_help_panel=DATA),
]
HeldOut = Annotated[
    float,
    typer.Option(help="Share (below 1) or number of rows of --data to hold out.", rich_help_panel=DATA),
]
PromptName = Annotated[str, typer.Option(help="Name of the prompt.", rich_help_panel=PROMPT)]
Deep = Annotated[
    bool,
    typer.Option(
        help="Tune keys and values of every layer (prefix tuning) instead of embeddings.", rich_help_panel=PROMPT
    ),
]
Register = Annotated[
    str | None,
    typer.Option(
        "--register",
        help="Add the finished prompt to the registry as the next version of this name (see versions). Several prompts "
        "of a run get the names NAME-PROMPT.",
        rich_help_panel=OUTPUT,
    ),
]
Report = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON file for all results.", rich_help_panel=OUTPUT)
]


def _figure_path(path: Path | None) -> Path | None:
    return None if path is None else check_figure_path(path)


Figure = Annotated[
    Path | None,
    typer.Option("--figure", help="File for a figure: svg, png or pdf.", callback=_figure_path, rich_help_panel=OUTPUT),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", "-b", min=1, help="Largest number of rows in a batch.", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of the model's numbers. auto: as stored on a GPU; on a CPU, the faster of float32 and bfloat16.",
        metavar="|".join(DTYPES),
        autocompletion=completion(DTYPES),
        rich_help_panel=MACHINE,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Folder or Hub name of a LoRA or another adapter of PEFT, which runs in the layers of the base model.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="int8: weights of linear layers in 8 bits (torchao).",
        metavar="int8",
        autocompletion=completion(("int8",)),
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ... By default a GPU if there is one.", rich_help_panel=MACHINE),
]


def options_of(
    group: type, *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> list[inspect.Parameter]:
    """A parameter for Typer for each described field of a dataclass, with the field's name and default.

    The values are checked by the dataclass, not by Typer, so that Python and the command line have the same rules.
    """
    parameters = []
    flags = _flags(group)
    for field, about in descriptions(group):
        if field.name in without or (only is not None and field.name not in only):
            continue
        option = typer.Option(
            *flags[field.name],
            help=_with_flags(about.help, flags),
            metavar=about.rule.metavar,
            autocompletion=completion(about.rule.choices),
            rich_help_panel=about.group,
        )
        kind = about.rule.kind if field.default is not None else about.rule.kind | None
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    return parameters


def with_options(
    name: str, group: type, *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces a command's parameter by the options of a dataclass.

    The command gets a function that makes the dataclass from the options, with changes by name. Its errors name the
    options.
    """
    parameters = options_of(group, only=only, without=without)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in parameters}

            def make(**changes: Any) -> Any:
                try:
                    return group(**given | changes)
                except ValueError as error:
                    text = str(error).replace(" or None, got", ", got")  # an option that is left out is not None
                    raise ValueError(_with_flags(text, _flags(group))) from error

            command(**values, **{name: make})

        own: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            own += parameters if parameter.name == name else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        wrapper.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in own}
        return wrapper

    return decorate


def _flags(group: type) -> dict[str, tuple[str, ...]]:
    """The names of the option of each field; the first is the one that messages use."""
    return {field.name: about.flags or (f"--{field.name.replace('_', '-')}",) for field, about in descriptions(group)}


def _with_flags(text: str, flags: dict[str, tuple[str, ...]]) -> str:
    """The text with options instead of `fields`."""
    return re.sub(r"`(\w+)`", lambda match: flags[match[1]][0] if match[1] in flags else match[0], text)
