"""Shared by ``predict`` and ``generate``: the pipeline, each row's prompt, and where answers are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
from ..base.progress import progress_bar
from .options import DATA, MACHINE, OUTPUT
from .output import console
from .prompts import base_model_name

if TYPE_CHECKING:
    from ..inference.files import Answers
    from ..inference.pipeline import SoftPromptPipeline
    from ..tasks.examples import Examples

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


def require_for_output(output: Path | None) -> None:
    """The packages that write the file."""
    if output is not None and output.suffix == ".csv":
        require("train", "pandas", purpose=f"writing {output}")
    if output is not None and output.suffix == ".parquet":
        require("train", "pandas", "pyarrow", purpose=f"writing {output}")


def load_pipeline(
    prompt: Path, model: str | None, *, batch_size: int, batch_tokens: int, dtype: str, device: str | None
) -> SoftPromptPipeline:
    """A pipeline on the prompts of a folder and the model they were tuned on."""
    from ..hf.loading import load_base_model
    from ..inference.pipeline import SoftPromptPipeline
    from ..inference.prompt_bank import PromptBank

    base, tokenizer = load_base_model(base_model_name(prompt, model), dtype, device, console=console)
    bank = PromptBank(base)
    bank.add_directory(prompt)
    return SoftPromptPipeline(bank, tokenizer, max_batch_rows=batch_size, max_batch_tokens=batch_tokens)


def names_of_rows(rows: Examples, column: str | None, known: Sequence[str]) -> list[str | None]:
    """The name of each row's prompt."""
    if column is None:
        if len(known) != 1:
            raise ValueError(f"--prompt-name-column must be given, because there are {len(known)} prompts")
        return [known[0]] * len(rows)
    if column not in rows[0]:
        raise ValueError(f"no column {column!r} in the data, which has {', '.join(rows[0])}")
    return [None if row[column] is None or row[column] == "" else str(row[column]) for row in rows]


def answer_all(
    rows: Examples,
    names: list[str | None],
    answer: Callable[..., list[dict[str, Any]]],
    output: Path | None,
    resume: bool,
) -> None:
    """Answers rows with their prompts and writes them, to standard output if there is no file."""
    from ..inference.files import in_chunks

    if output is not None:
        write_file(rows, in_chunks(answer, rows, names), output, resume)
        return
    with progress_bar(len(rows), console) as advance:
        results = answer(rows, names)
        advance(len(rows))
    for row, result in zip(rows, results, strict=True):
        sys.stdout.write(json.dumps(row | result, ensure_ascii=False) + "\n")


def write_file(rows: Examples, answers: Answers, output: Path, resume: bool) -> None:
    from ..inference.files import write_answers

    with progress_bar(len(rows), console) as advance:
        errors = write_answers(rows, answers, output, resume=resume, done=advance)
    console.print(f"wrote {len(rows)} rows, {errors} of them errors, to {output}")
