"""Shared by ``predict`` and ``generate``: the pipeline, each row's prompt, and where answers are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..base.progress import progress_bar
from .options import DATA, MACHINE, OUTPUT
from .output import console
from .prompts import base_model_name, folders_by_name, refuse_heads, without_task

if TYPE_CHECKING:
    from ..inference.files import Answers, Written
    from ..inference.pipeline import SoftPromptPipeline
    from ..tasks.examples import Examples
    from ..tasks.task import Task

SOME_FAILED = 3
"""Status of a command that answered some rows, but not all."""
PromptNameColumn = Annotated[
    str | None,
    typer.Option(
        help="Column that names each row's prompt; an empty name runs the row without a prompt. "
        "By default all rows use the folder's only prompt.",
        rich_help_panel=DATA,
    ),
]
AnswersFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="jsonl, csv or parquet file. By default jsonl on standard output.",
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[
    bool, typer.Option(help="Continue after the rows an interrupted run has written.", rich_help_panel=OUTPUT)
]
BatchTokens = Annotated[
    int,
    typer.Option(min=1, help="Largest number of tokens in a batch, prompts not counted.", rich_help_panel=MACHINE),
]


def check_answers_file(output: Path | None, data: str, resume: bool) -> None:
    """Checks that answers can be written: the packages for it, and a file that holds neither answers nor the rows."""
    from ..inference.files import check_output

    if output is None:
        if resume:
            raise ValueError("--resume cannot be used without --output")
        return
    check_output(output, data, resume=resume)
    if output.suffix.lower() == ".parquet":
        require("train", "pyarrow", purpose=f"writing {output}")


def load_pipeline(
    prompt: Path,
    model: str | None,
    *,
    batch_size: int,
    batch_tokens: int,
    dtype: str,
    device: str | None,
    adapter: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    task: Task | None = None,
) -> SoftPromptPipeline:
    """A pipeline on the prompts of a folder and the model they were tuned on.

    Args:
        adapter, quantize: as for :func:`load_base_model`.
        force: also load prompts that were tuned on other weights than the model's.
        task: the task of prompts that have no task.json.
    """
    from ..hf.loading import load_base_model
    from ..inference.pipeline import SoftPromptPipeline
    from ..inference.prompt_bank import PromptBank

    folders = folders_by_name(prompt)
    refuse_heads(folders)
    loading: dict[str, Any] = {"adapter": adapter, "quantize": quantize, "console": console}
    base, tokenizer = load_base_model(base_model_name(prompt, model), dtype, device, **loading)
    bank = PromptBank(base)
    bare = without_task(folders)
    for name, folder in folders.items():
        bank.add(name, folder, task=task if name in bare else None, force=force)
    return SoftPromptPipeline(bank, tokenizer, max_batch_rows=batch_size, max_batch_tokens=batch_tokens)


def names_of_rows(rows: Examples, column: str | None, known: Sequence[str]) -> list[str | None]:
    """The name of each row's prompt."""
    if column is None:
        if len(known) != 1:
            raise ValueError(f"--prompt-name-column must be given, because there are {len(known)} prompts")
        return [known[0]] * len(rows)
    from ..prompts.peft_files import safe_name
    from ..tasks.rows import columns_of, place
    from ..tasks.values import is_missing, label_name

    if column not in (columns := columns_of(rows)):
        raise ValueError(f"no column {column!r} in the data, which has {', '.join(columns)}")
    names: list[str | None] = []
    for index, row in enumerate(rows):
        value = row.get(column)
        try:
            name = None if is_missing(value) else label_name(value, column)
        except ValueError as error:
            raise ValueError(f"{place(rows, index)}: {error}") from error
        names.append(name if name is None or name in known or safe_name(name) not in known else safe_name(name))
    return names


def answer_all(
    rows: Examples,
    names: list[str | None],
    answer: Callable[..., list[dict[str, Any]]],
    output: Path | None,
    resume: bool,
) -> None:
    """Answers rows with their prompts and writes them, to standard output if there is no file.

    Raises:
        typer.Exit: with status 3 if some rows got an error, 1 if all did.
    """
    from ..inference.files import in_chunks, write_lines
    from ..tasks.cuts import counting_cuts

    answers = in_chunks(answer, rows, names)
    with counting_cuts():
        if output is not None:
            write_file(rows, answers, output, resume)
            return
        with progress_bar(len(rows), console) as advance:
            written = write_lines(rows, answers, sys.stdout.buffer, done=advance)
    _finish(written, "standard output")


def write_file(rows: Examples, answers: Answers, output: Path, resume: bool) -> None:
    """Writes answers to a file; the end as in :func:`answer_all`."""
    from ..inference.files import write_answers

    with progress_bar(len(rows), console) as advance:
        written = write_answers(rows, answers, output, resume=resume, done=advance)
    _finish(written, str(output))


def _finish(written: Written, target: str) -> None:
    console.print(
        f"wrote {written.rows} rows, {written.errors} of them errors, to {target}", soft_wrap=True, markup=False
    )
    if written.errors:
        raise typer.Exit(1 if written.errors == written.rows else SOME_FAILED)
