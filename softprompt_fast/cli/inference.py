"""The command line's part that uses prompts: ``predict`` and ``generate``, with a prompt for each row if need be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import BatchSize, Data, Device, Dtype, OptionalModel, app, console, progress_bar

Prompts = Annotated[
    Path, typer.Option("--prompt", "-p", help="A prompt's folder, a run's output folder, or a folder of prompts.")
]
PromptColumn = Annotated[
    str | None,
    typer.Option(help="Column naming each row's prompt; empty: none. Default: the only prompt there is."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="jsonl, csv or parquet file; default: jsonl on standard output.")
]
Resume = Annotated[bool, typer.Option(help="Go on behind the rows that an interrupted run has written.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch, prompts not counted.")]


class Engine(str, Enum):
    """Where rows are answered."""

    local = "local"
    ray = "ray"


@app.command()
def predict(
    prompt: Prompts,
    data: Data,
    output: Output = None,
    model: OptionalModel = None,
    prompt_column: PromptColumn = None,
    split: str = "train",
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of tasks that generate text.")] = 64,
    ensemble: Annotated[bool, typer.Option(help="The folder's prompts decide together on each row.")] = False,
    combine: Annotated[
        str | None,
        typer.Option(help="mean_probability, mean_logit or majority; default: as the folder's ensemble.json says."),
    ] = None,
    resume: Resume = False,
    engine: Annotated[Engine, typer.Option(help="local, or ray: spread over workers (extra `ray`).")] = Engine.local,
    workers: Annotated[int, typer.Option(min=1, help="Of --engine ray, each with a model of its own.")] = 2,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Adds a prediction to each row, as its prompt's task asks, in the rows' order."""
    from ..inference.files import answer_rows
    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    options = {"max_new_tokens": max_new_tokens}
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
        "device": device,
    }
    if ensemble and (prompt_column is not None or engine is Engine.ray):
        raise ValueError("--ensemble must be without --prompt-column and --engine ray")
    if engine is Engine.ray:
        from ..inference.ray_engine import RayAnswers

        if output is None:
            raise ValueError("--output must be given with --engine ray")
        known, base = _prompt_names(prompt, model)
        names = _names(rows, prompt_column, known)
        _report(rows, RayAnswers(rows, names, prompt, base, workers, options, settings), output, resume)
        return
    pipe = load_pipeline(prompt, model, **settings)
    if ensemble:
        members, how = ensemble_members(prompt, pipe.bank.names)
        _write(
            rows,
            [None] * len(rows),
            lambda part, _: pipe.classify(part, ensemble=members, combine=combine or how),
            output,
            resume,
        )
        return
    names = _names(rows, prompt_column, pipe.bank.names)
    _write(rows, names, lambda part, used: answer_rows(pipe, part, used, options), output, resume)


@app.command()
def generate(
    prompt: Prompts,
    data: Data,
    output: Output = None,
    model: OptionalModel = None,
    prompt_column: PromptColumn = None,
    text_column: Annotated[
        str, typer.Option(help="Column of the text, for prompts whose task does not say which.")
    ] = "text",
    split: str = "train",
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    do_sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; several may be given.")] = None,
    seed: int = 0,
    resume: Resume = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Continues each row's text, in the rows' order."""
    from transformers import set_seed

    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    pipe = load_pipeline(prompt, model, batch_size=batch_size, batch_tokens=batch_tokens, dtype=dtype, device=device)
    names = _names(rows, prompt_column, pipe.bank.names)
    given = {"temperature": temperature, "top_p": top_p, "stop_strings": stop}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    options |= {key: value for key, value in given.items() if value is not None}
    set_seed(seed)

    def answer(part: Sequence[dict[str, Any]], used: Sequence[str | None]) -> list[dict[str, Any]]:
        texts: list[Any] = []
        for row, name in zip(part, used, strict=True):
            task = pipe.bank.task(name) if name is not None and name in pipe.bank else None
            if task is None and text_column not in row:
                raise ValueError(f"no column {text_column!r} in the data, which has {list(row)}")
            texts.append(row if task is not None else str(row[text_column]))
        found = pipe.generate(texts, used, **options)
        return [{"generated": result["text"]} if "text" in result else result for result in found]

    _write(rows, names, answer, output, resume)


def load_pipeline(
    prompt: Path, model: str | None, *, batch_size: int, batch_tokens: int, dtype: str, device: str | None
) -> Any:
    """A pipeline on the prompts of a folder and the model they were tuned on."""
    from ..hf.loading import load_base_model
    from ..inference.pipeline import SoftPromptPipeline
    from ..inference.prompt_bank import PromptBank

    _, name = _prompt_names(prompt, model)
    base, tokenizer = load_base_model(name, dtype, device)
    bank = PromptBank(base)
    bank.add_directory(prompt)
    return SoftPromptPipeline(bank, tokenizer, max_batch_rows=batch_size, max_batch_tokens=batch_tokens)


def _prompt_names(prompt: Path, model: str | None) -> tuple[list[str], str]:
    """Names of the prompts in a folder, and the base model they were made for."""
    from ..prompts.peft_files import prompt_folders, read_config
    from ..tasks.task import TASK_FILE, Task

    folders = prompt_folders(prompt)
    said = [Task.load(folder).model for folder in folders if (folder / TASK_FILE).is_file()]
    said += [read_config(folder, None).get("base_model_name_or_path") for folder in folders]
    found = list(dict.fromkeys(name for name in said if name))
    if model is None and not found:
        raise ValueError("--model must be given: the prompts do not say which model they were tuned on")
    return [folder.resolve().name for folder in folders], model or found[0]


def ensemble_members(folder: Path, known: list[str]) -> tuple[list[str], str]:
    """An ensemble's prompts, and how they decide: as its file says, or all of the folder by mean probability."""
    file = folder / "ensemble.json"
    if not file.is_file():
        return known, "mean_probability"
    facts = json.loads(file.read_text())
    return facts["members"], facts["combine"]


def _names(rows: Sequence[dict[str, Any]], column: str | None, known: list[str]) -> list[str | None]:
    if column is None:
        if len(known) != 1:
            raise ValueError(f"--prompt-column must be given, for there are {len(known)} prompts")
        return [known[0]] * len(rows)
    if column not in rows[0]:
        raise ValueError(f"no column {column!r} in the data, which has {list(rows[0])}")
    return [None if row[column] is None or row[column] == "" else str(row[column]) for row in rows]


def _write(
    rows: list[dict[str, Any]],
    names: list[str | None],
    answer: Callable[..., list[dict[str, Any]]],
    output: Path | None,
    resume: bool,
) -> None:
    from ..inference.files import in_chunks

    if output is not None:
        _report(rows, in_chunks(answer, rows, names), output, resume)
        return
    with progress_bar(len(rows)) as advance:
        found = answer(rows, names)
        advance(len(rows))
    for row, result in zip(rows, found, strict=True):
        sys.stdout.write(json.dumps(row | result, ensure_ascii=False) + "\n")


def _report(rows: list[dict[str, Any]], answers: Any, output: Path, resume: bool) -> None:
    from ..inference.files import write_answers

    with progress_bar(len(rows)) as advance:
        errors = write_answers(rows, answers, output, resume=resume, done=advance)
    console.print(f"wrote {len(rows)} rows, {errors} of them errors, to {output}")
