"""``monitor``: whether a prompt still fits its traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..base.locations import located, names_a_version
from ..base.progress import progress_bar
from .data import DataOptions
from .options import DATA, OUTPUT, BatchSize, Device, Dtype, OptionalModel, PromptFolder, with_options
from .output import EXIT_STATUS, check_outputs, console
from .prompts import Force, load_tuned, refuse_heads

if TYPE_CHECKING:
    from ..evaluation.profile import Profile
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import Examples
    from ..tasks.task import Task

DRIFT_STATUS, NOT_RUN_STATUS = 1, 2

TESTS = "Tests"
NewRows = Annotated[
    str | None,
    typer.Option("--data", "-d", help="New rows, with or without labels: a file, a folder or a Hub dataset."),
]
Log = Annotated[Path | None, typer.Option(help="New rows as a log that predict --log has written, instead of --data.")]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Rows that the prompt is expected to see, or another profile.json. By default the profile that training "
        "has recorded from its held-out rows.",
        rich_help_panel=DATA,
    ),
]
Record = Annotated[
    bool,
    typer.Option(help="Also write the profile of --reference into the prompt's folder.", rich_help_panel=DATA),
]
Bare = Annotated[
    bool,
    typer.Option(help="Also run the model without the prompt: half of the time.", rich_help_panel=TESTS),
]
Alpha = Annotated[
    float,
    typer.Option(help="Chance of any false alarm in a run, all tests together.", rich_help_panel=TESTS),
]
Page = Annotated[
    Path | None, typer.Option(help="HTML page with figures; it needs no other file.", rich_help_panel=OUTPUT)
]
Json = Annotated[Path | None, typer.Option("--json", help="JSON file for all results.", rich_help_panel=OUTPUT)]
Prometheus = Annotated[
    Path | None, typer.Option(help="File in Prometheus' text format (.prom).", rich_help_panel=OUTPUT)
]
History = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps each run's results; --report then draws each statistic over time.",
        rich_help_panel=OUTPUT,
    ),
]


@with_options("data_options_of", DataOptions)
def monitor(
    prompt: PromptFolder,
    data_options_of: Callable[..., DataOptions],
    data: NewRows = None,
    log: Log = None,
    model: OptionalModel = None,
    force: Force = False,
    reference: Reference = None,
    record: Record = False,
    bare: Bare = True,
    alpha: Alpha = 0.05,
    report: Page = None,
    json_file: Json = None,
    prometheus: Prometheus = None,
    history: History = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Compares new rows with the rows a prompt was tuned for: their inputs, the answers and, with labels, the score.

    The status is 0 if all is fine, 1 for drift, 2 if nothing could be judged: an error, or too few rows.
    """
    with _errors_are_not_drift():
        if (data is None) == (log is None):
            raise ValueError("give --data or --log, not both" if data else "--data or --log must be given")
        if not 0 < alpha < 1:
            raise ValueError(f"--alpha must be between 0 and 1, got {alpha}")
        if record and reference is None:
            raise ValueError("--record cannot be used without --reference")
        if record and names_a_version(prompt):
            raise ValueError(f"--record cannot change a registered version, got --prompt {prompt}")
        require("train", "datasets", "sklearn", "matplotlib", purpose="monitor")
        outputs = [path for path in (report, json_file, prometheus) if path is not None]
        if history is not None and history.exists() and not history.is_dir():
            raise NotADirectoryError(f"--history must be a folder, got the file {history}")
        inputs = [Path(path) for path in (data, log, reference) if path is not None]
        check_outputs(outputs, inputs, folders=[history] if history is not None else [])
        from ..base.files import append_json_lines
        from ..monitoring.lines import HISTORY_FILE, read_history
        from ..monitoring.monitor import Monitor
        from ..monitoring.report import DRIFT, TOO_FEW
        from ..monitoring.table import print_report

        source = _Source(prompt, data_options_of(), model, force, dtype, device, batch_size, bare)
        profile = source.profile(reference, record)
        watch = Monitor(profile, alpha=alpha)
        watch.update(source.observations(profile, data) if data is not None else source.logged(profile, log))
        result = watch.report()
        values = result.to_json()
        earlier = read_history(history, profile.digest) if history is not None else []
        if history is not None:
            append_json_lines(history / HISTORY_FILE, [values])
        _write(result, values, [*earlier, values], report, json_file, prometheus)
        print_report(result, console)
    if result.status == TOO_FEW:
        raise typer.Exit(NOT_RUN_STATUS)
    if result.status == DRIFT:
        raise typer.Exit(DRIFT_STATUS)


@contextmanager
def _errors_are_not_drift() -> Iterator[None]:
    """Errors end the process with another status than drift."""
    try:
        yield
    except Exception as error:
        setattr(error, EXIT_STATUS, NOT_RUN_STATUS)
        raise


def _write(
    result: Any,
    values: dict[str, Any],
    history: list[dict[str, Any]],
    report: Path | None,
    json_file: Path | None,
    prometheus: Path | None,
) -> None:
    from ..base.files import write_atomically, write_json
    from ..monitoring.page import html_page
    from ..monitoring.prometheus import prometheus_text

    if report is not None:
        write_atomically(report, html_page(result, history))
    if json_file is not None:
        write_json(json_file, values)
    if prometheus is not None:
        write_atomically(prometheus, prometheus_text(result))
    for path in (report, json_file, prometheus):
        if path is not None:
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


@dataclass
class _Source:
    """Where observations come from. The model is loaded only if rows are to be run."""

    prompt: Path
    data_options: DataOptions
    model: str | None
    force: bool
    dtype: str
    device: str | None
    batch_size: int
    bare: bool
    loaded: tuple[SoftPromptModel, Any, Task] | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder of the one prompt."""
        from ..prompts.peft_files import prompts_by_name
        from ..tasks.task import TASK_FILE

        folders = prompts_by_name(located(self.prompt))
        if len(folders) != 1:
            raise ValueError(f"--prompt must hold one prompt, got {', '.join(folders)}")
        refuse_heads(folders)
        (folder,) = folders.values()
        if not (folder / TASK_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {TASK_FILE}, which says how rows become text; monitor needs it")
        return folder

    def tuned(self) -> tuple[SoftPromptModel, Any, Task]:
        if self.loaded is None:
            self.loaded = load_tuned(self.folder, self.model, self.dtype, self.device, force=self.force)
        return self.loaded

    def profile(self, reference: str | None, record: bool) -> Profile:
        """The profile in the prompt's folder or of ``--reference``, which must belong to the prompt."""
        from ..evaluation.profile import PROFILE_FILE, Profile, prompt_digest, record_profile
        from ..tasks.task import Task

        folder = self.folder
        task = Task.load(folder)
        if reference is not None and Path(reference).name != PROFILE_FILE:
            rows = _with_text(task, self.data_options.read(reference), "--reference")
            tuned, tokenizer, task = self.tuned()
            profile = record_profile(
                tuned,
                tokenizer,
                task,
                rows,
                folder,
                source=f"rows of {Path(reference).name}",
                batch_size=self.batch_size,
            )
        else:
            profile = Profile.load(folder if reference is None else reference)
            if (own := prompt_digest(folder, task)) != profile.digest:
                raise ValueError(
                    f"the profile was recorded for prompt {profile.prompt!r} ({profile.digest}), got a prompt whose "
                    f"numbers or task differ ({own}); record it again with --reference"
                )
        if record:
            console.print(f"wrote {profile.save(folder)}", highlight=False, markup=False, soft_wrap=True)
        return replace(profile, prompt=folder.resolve().name)

    def observations(self, profile: Profile, data: str) -> list[Any]:
        from ..evaluation.observations import observe
        from ..tasks.examples import has_target
        from ..tasks.task import Task

        # Everything that the rows themselves can have wrong, before the model is loaded.
        rows = _with_text(Task.load(self.folder), self.data_options.read(data), "--data")
        tuned, tokenizer, task = self.tuned()
        passes = len(rows) * (1 + self.bare)
        if task.kind == "generation":
            passes += sum(has_target(task, row) for row in rows)
        with progress_bar(passes, console) as advance:
            return observe(
                tuned,
                tokenizer,
                task,
                rows,
                known=profile.known_tokens,
                bare=self.bare,
                batch_size=self.batch_size,
                progress=advance,
            )

    def logged(self, profile: Profile, log: Path | None) -> list[dict[str, Any]]:
        from ..monitoring.lines import read_log

        assert log is not None
        return read_log(log, profile)


def _with_text(task: Task, rows: Examples, option: str) -> Examples:
    """Rows that have text; their labels must be the task's, if they have any.

    Raises:
        ValueError: no rows, none with text, or a label that the task does not know.
    """
    from ..tasks.examples import is_empty, unreadable
    from ..tasks.rows import choose, place
    from ..tasks.values import is_missing

    filled = []
    for i, row in enumerate(rows):
        try:
            if is_empty(task, row) or unreadable(task, row) is not None:
                continue
            task.text(row)
            if task.kind == "classification" and not is_missing(row.get(task.target_column)):
                task.label(row)
        except ValueError as error:
            raise ValueError(f"{place(rows, i)}: {error}") from error
        filled.append(i)
    if not filled:
        raise ValueError(f"{option} must hold rows with text, got none among {len(rows)}")
    if len(filled) < len(rows):
        console.print(
            f"{len(rows) - len(filled)} rows of {option} without readable text are left out",
            highlight=False,
            markup=False,
        )
    return choose(rows, filled)
