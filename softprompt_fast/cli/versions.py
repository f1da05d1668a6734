"""``versions``: prompts in production, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..base.extras import require
from ..base.locations import names_a_version
from ..base.progress import progress_bar
from ..tuning.settings import TuningSettings
from .data import DataOptions
from .options import DATA, BatchSize, Device, Dtype, OptionalModel, Report, with_options
from .output import console, write_report
from .prompts import TaskTemplate, TaskWords, folders_by_name, given_task

if TYPE_CHECKING:
    from ..registry.prompt_registry import PromptRegistry

PACKAGES = ("mlflow", "sqlalchemy", "alembic")
HELP = """Keeps versions of prompts: which one answers now, what changed, and the way back.

A version is named NAME@NUMBER or NAME@ALIAS, such as sentiment@7 or sentiment@production. Everything that takes the
folder of a prompt takes such a name too."""
EXAMPLES = (
    "softprompt-fast train -m MODEL -d reviews.jsonl -o run --register sentiment",
    "softprompt-fast versions promote sentiment@1",
    "softprompt-fast predict -p sentiment@production -d new.jsonl",
    "softprompt-fast versions diff sentiment@production sentiment@2 -d test.jsonl",
    "softprompt-fast versions promote sentiment@2 -d test.jsonl",
    "softprompt-fast versions rollback sentiment",
)

Registry = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help="Folder, database or MLflow server of the versions. By default MLFLOW_TRACKING_URI, or mlflow.db in the "
        "current folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Version = Annotated[str, typer.Argument(help="Name of a version: NAME@NUMBER, NAME@ALIAS or NAME@latest.")]
Alias = Annotated[str, typer.Option("--alias", help="Alias that names the version which answers.")]
Rows = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Rows to compare the answers on, a file or a Hub dataset.", rich_help_panel=DATA),
]
LabelledRows = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="Labelled rows: the version is refused if it is significantly worse on them than the present one.",
        rich_help_panel=DATA,
    ),
]


def add(
    folder: Annotated[Path, typer.Argument(help="Folder of a prompt, or the output folder of a run with one prompt.")],
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="Registered name. By default the name of the prompt's folder.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias that names the new version from now on.")] = None,
    parent: Annotated[
        str | None,
        typer.Option(help="Version that the prompt was tuned from. By default the one that --init named, if any."),
    ] = None,
    description: Annotated[str, typer.Option(help="Note that is shown with the version.")] = "",
    template: TaskTemplate = None,
    label_word: TaskWords = None,
    target_column: Annotated[
        str | None,
        typer.Option(help="For a prompt without task.json: column of the label or response.", rich_help_panel=DATA),
    ] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Copies a prompt into the registry as the next version of a name; nothing changes a version afterwards."""
    prompts = _registry(registry)
    folders = folders_by_name(folder)
    task = given_task(folders, template, label_word, target_column)
    name = name or next(iter(folders))
    version = prompts.add(folder, name, alias=alias, parent=parent, description=description, task=task)
    if as_json:
        _print_json(version.to_json())
    else:
        also = f" and {version.name}@{alias}" if alias else ""
        console.print(
            f"added {version}{also} to {registry or prompts.uri}", highlight=False, markup=False, soft_wrap=True
        )


def list_versions(
    name: Annotated[str | None, typer.Argument(help="Registered name. By default all.")] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Shows the versions of a name, or of all names, with their aliases and scores."""
    from ..registry.history import MOVES_SHOWN
    from ..registry.tables import print_history, print_versions

    prompts = _registry(registry)
    names = prompts.names() if name is None else [name]
    every = [version for one in names for version in prompts.versions(one)]
    if as_json:
        _print_json([version.to_json() for version in every])
        return
    if not every:
        console.print(f"no versions in {prompts.uri}", highlight=False, markup=False, soft_wrap=True)
        return
    print_versions(every, Console())
    for one in names:
        print_history(prompts.history(one)[-MOVES_SHOWN:], Console())


def show(version: Version, registry: Registry = None, as_json: AsJson = False) -> None:
    """Shows what a version holds: scores, settings, base model, rows, parent, author."""
    from ..registry.tables import print_version

    found = _registry(registry).get(version)
    if as_json:
        _print_json(found.to_json())
    else:
        print_version(found, Console())


@with_options("data_options_of", DataOptions)
def diff(
    first: Annotated[str, typer.Argument(help="Name of a version, or the folder of a prompt.")],
    second: Annotated[str, typer.Argument(help="Name of another version, or the folder of a prompt.")],
    data_options_of: Callable[..., DataOptions],
    data: Rows = None,
    model: OptionalModel = None,
    show: Annotated[int, typer.Option(min=0, help="Number of changed answers to show.", rich_help_panel=DATA)] = 20,
    output: Report = None,
    registry: Registry = None,
    as_json: AsJson = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Shows how two versions differ: settings, scores, vectors and, on rows, the answers that changed."""
    data_options = data_options_of()
    prompts = _registry(registry)
    from ..registry.tables import print_difference

    rows = None if data is None else data_options.read(data)
    with progress_bar(2 * len(rows or ()), console) as advance:
        difference = prompts.diff(
            first,
            second,
            rows=rows,
            model=model,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=advance,
        )
    if as_json:
        _print_json(difference.to_json())
    else:
        print_difference(difference, Console(), shown_rows=show)
    write_report(difference.to_json(), output)


@with_options("data_options_of", DataOptions)
def promote(
    version: Version,
    data_options_of: Callable[..., DataOptions],
    alias: Alias = "production",
    data: LabelledRows = None,
    model: OptionalModel = None,
    force: Annotated[bool, typer.Option(help="Promote it whatever the checks say.")] = False,
    registry: Registry = None,
    as_json: AsJson = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Makes an alias name a version, unless its base model is another one or its score is significantly worse."""
    data_options = data_options_of()
    prompts = _registry(registry)
    rows = None if data is None else data_options.read(data)
    with progress_bar(2 * len(rows or ()), console) as advance:
        move = prompts.promote(
            version,
            alias,
            rows=rows,
            model=model,
            force=force,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=advance,
        )
    _say_move(move, as_json)


def rollback(
    name: Annotated[str, typer.Argument(help="Registered name, or NAME@ALIAS.")],
    alias: Annotated[str | None, typer.Option(help="Alias to move back. By default production.")] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Moves an alias back to the version before the last promotion; again, to the one before that."""
    prompts = _registry(registry)
    name, _, named = name.partition("@")
    if named and alias not in (None, named):
        raise ValueError(f"--alias cannot be combined with {name}@{named}")
    _say_move(prompts.rollback(name, alias or named or "production"), as_json)


def fetch(
    version: Version,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for the prompt. By default NAME-NUMBER.")
    ] = None,
    registry: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Copies a version's prompt into a folder, after a check of its content hash; prints the folder."""
    prompts = _registry(registry)
    found = prompts.get(version)
    folder = prompts.fetch(str(found), output or Path(f"{found.name}-{found.number}"))
    if as_json:
        _print_json({"version": str(found), "folder": str(folder)})
    else:
        print(folder)


def verify(registry: Registry = None, as_json: AsJson = False) -> None:
    """Checks that the files of every version are those that were added. The status is 1 if some are not."""
    prompts = _registry(registry)
    faults = prompts.verify()
    count = sum(len(prompts.versions(name)) for name in prompts.names())
    if as_json:
        _print_json({"versions": count, "faults": faults})
    else:
        for fault in faults:
            print(fault)
        console.print(f"{count} versions, {len(faults)} faults", highlight=False, markup=False)
    if faults:
        raise typer.Exit(1)


COMMANDS: dict[str, Any] = {
    "add": add,
    "list": list_versions,
    "show": show,
    "diff": diff,
    "promote": promote,
    "rollback": rollback,
    "fetch": fetch,
    "verify": verify,
}


def versions_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(name="versions", help=HELP, no_args_is_help=True, rich_markup_mode="rich")
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def prepare_register(name: str | None, settings: TuningSettings) -> TuningSettings:
    """Checks before a run that its prompt can be registered afterwards, if a name is given.

    Returns:
        The settings with the number of the version that ``init`` names, because an alias can move during the run.

    Raises:
        ImportError: MLflow is not installed.
        ValueError: a name that is not allowed.
        OSError: the registry does not answer or cannot be written.
    """
    if name is not None:
        require("production", *PACKAGES, purpose="--register")
        from ..registry.version_names import check_registered_name

        check_registered_name(name)
        _registry(None).prepare()
    return replace(settings, init=pinned(settings.init))


def pinned(init: Any) -> Any:
    """Initial values, with the number of the version if they name one: an alias can move during the run."""
    return str(_registry(None).get(init)) if isinstance(init, str) and names_a_version(init) else init


def register_prompts(name: str | None, folders: list[Path]) -> None:
    """Adds the prompts of a finished run to the registry, if a name is given. Of several processes the first does."""
    import torch.distributed as dist

    if name is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return
    prompts = _registry(None)
    for folder in folders:
        version = prompts.add(folder, name if len(folders) == 1 else f"{name}-{folder.name}")
        console.print(f"registered {version} in {prompts.uri}", highlight=False, markup=False, soft_wrap=True)


def _registry(uri: str | None) -> PromptRegistry:
    require("production", *PACKAGES, purpose="versions")
    from ..registry.prompt_registry import PromptRegistry

    return PromptRegistry(uri)


def _say_move(move: Any, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(move))
        return
    before = "" if move.before is None else f"; it was {move.name}@{move.before}"
    console.print(f"{move.name}@{move.alias} is {move.name}@{move.after} now{before}", highlight=False, markup=False)
    if move.forced:
        console.print(f"forced, although {move.forced}", highlight=False, markup=False, soft_wrap=True)


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))
