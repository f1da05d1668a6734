"""The command line's part that looks at data and prompts: ``analyze``, ``interpret``, ``prune``, ``similar``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    OptionalModel,
    PromptFolder,
    TaskKind,
    _pairs,
    app,
    console,
    progress_bar,
)

Kind = Annotated[TaskKind, typer.Option(help="Choose a label, or continue with text.")]
TextColumn = Annotated[str, typer.Option(help="Column of the text (classification).")]
LabelColumn = Annotated[str, typer.Option(help="Column of the label (classification).")]
PromptColumn = Annotated[str, typer.Option(help="Column of what is asked (generation).")]
ResponseColumn = Annotated[str, typer.Option(help="Column of the answer (generation).")]
Template = Annotated[str | None, typer.Option(help=r"Text the model reads; columns in braces, \n is a line break.")]
LabelWords = Annotated[list[str] | None, typer.Option(help="LABEL=WORD, once per label; default: the label itself.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Longest text in tokens.")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file with everything found.")]
Picture = Annotated[Path | None, typer.Option("--figure", help="svg, png or pdf file.")]
Rows = Annotated[str | None, typer.Option("--data", "-d", help="Held-out rows: a file or a hub data set.")]


@app.command()
def analyze(
    model: Model,
    data: Data,
    validation: Annotated[str | None, typer.Option(help="Held-out rows; default: a part of the data.")] = None,
    held_out: Annotated[float, typer.Option(help="Share (below 1) or number of rows held out.")] = 0.1,
    output: Report = None,
    figure: Picture = None,
    task: Kind = TaskKind.classification,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    template: Template = None,
    label_word: LabelWords = None,
    max_length: MaxLength = 512,
    sample: Annotated[int, typer.Option(min=0, help="Rows for the model without a prompt; 0: none.")] = 500,
    split: str = "train",
    seed: int = 0,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Looks at data before tuning: lengths, classes, repeats, leaks, baselines, and a recipe."""
    from ..analysis.data_analysis import analyze as look
    from ..analysis.figures import analysis_figure
    from ..analysis.tables import print_analysis
    from ..hf.loading import load_base_model
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import split_rows
    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    chosen = task_of_options(
        rows, task, text_column, label_column, prompt_column, response_column, template, label_word
    )
    chosen.max_length = max_length
    if validation is not None:
        apart = load_rows(validation, split)
    else:
        rows, apart = split_rows(rows, held_out, seed)
    base, tokenizer = load_base_model(model, dtype, device)
    with progress_bar(min(sample, len(apart))) as advance:
        found = look(
            SoftPromptModel(base),
            tokenizer,
            chosen,
            rows,
            apart,
            sample=sample,
            batch_size=batch_size,
            seed=seed,
            progress=advance,
        )
    print_analysis(found, Console())
    _write(found.to_json(), output)
    _draw(lambda: analysis_figure(found), figure)


@app.command()
def interpret(
    prompt: Annotated[Path, typer.Option("--prompt", "-p", help="A prompt's folder, or a folder of prompts.")],
    data: Rows = None,
    model: OptionalModel = None,
    ablate: Annotated[
        str | None, typer.Option(help="The prompt whose vectors are dropped on the data, if there are several.")
    ] = None,
    neighbours: Annotated[int, typer.Option("--neighbours", "-k", min=1, help="Nearest tokens per vector.")] = 5,
    output: Report = None,
    figure: Picture = None,
    split: str = "train",
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Shows a prompt's neighbours, norms and, on rows, what each vector does. Neighbours are not an explanation."""
    from ..analysis.figures import interpretation_figure
    from ..analysis.interpretation import interpret as read
    from ..analysis.tables import print_interpretation
    from ..tasks.tables import load_rows

    rows = load_rows(data, split) if data is not None else []
    tuned, tokenizer, folders = _load_prompts(prompt, model, dtype, device)
    name = ablate or (next(iter(folders)) if len(folders) == 1 else None)
    task = _task_of(folders, name) if rows else None
    passes = 1 + len(tuned.prompts[name]) if rows and name is not None else 0
    with progress_bar(len(rows) * passes) as advance:
        found = read(
            tuned,
            tokenizer,
            {n: tuned.prompts[n].detach() for n in tuned.prompts},
            k=neighbours,
            task=task,
            rows=rows,
            ablate=name,
            batch_size=batch_size,
            progress=advance,
        )
    print_interpretation(found, Console())
    _write(found.to_json(), output)
    _draw(lambda: interpretation_figure(found), figure)


@app.command()
def prune(
    prompt: PromptFolder,
    data: Annotated[str, typer.Option("--data", "-d", help="Labelled rows that decide what goes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the shorter prompt goes.")],
    validation: Annotated[str | None, typer.Option(help="Other rows, scored before and after; default: half.")] = None,
    model: OptionalModel = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Vectors to keep at least.")] = 1,
    tolerance: Annotated[float, typer.Option(min=0.0, help="How far the loss may lie above the lowest seen.")] = 0.0,
    rescore: Annotated[bool, typer.Option(help="Score all vectors again after each removal: slower.")] = False,
    pieces: Annotated[int, typer.Option(min=0, help="Also set to zero pieces, so many per vector.")] = 0,
    figure: Picture = None,
    split: str = "train",
    seed: int = 0,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Removes a prompt's vectors that do not help; scores it on other rows before and after. Nothing is retrained."""
    from ..analysis.figures import pruning_figure
    from ..analysis.pruning import prune as shorten
    from ..analysis.tables import print_pruned
    from ..tasks.examples import split_rows
    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    others = load_rows(validation, split) if validation is not None else []
    if not others:
        rows, others = split_rows(rows, 0.5, seed)
    tuned, tokenizer, folders = _load_prompts(prompt, model, dtype, device)
    name = next(iter(folders))
    if len(folders) > 1:
        raise ValueError(f"--prompt must be one prompt, but {prompt} holds {list(folders)}")
    task = _task_of(folders, name)
    task.prompt = name
    if (output / name).exists():
        raise FileExistsError(f"{output / name} must not exist; choose another output folder")
    with console.status("scoring shortened prompts"):
        found = shorten(
            tuned,
            tokenizer,
            task,
            tuned.prompts[name],
            rows,
            others,
            min_tokens=min_tokens,
            tolerance=tolerance,
            rescore=rescore,
            pieces=pieces,
            batch_size=batch_size,
        )
    print_pruned(found, Console())
    console.print(f"saved in {found.save(tuned, task, output)}")
    _draw(lambda: pruning_figure(found), figure)


@app.command()
def similar(
    prompt: Annotated[Path, typer.Option("--prompt", "-p", help="A folder of prompts: the sources.")],
    data: Annotated[str | None, typer.Option("--data", "-d", help="Labelled rows of the target task.")] = None,
    target: Annotated[
        Path | None, typer.Option(help="A prompt of the target task, such as one tuned for a few steps.")
    ] = None,
    model: OptionalModel = None,
    output: Report = None,
    figure: Picture = None,
    task: Kind = TaskKind.classification,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = "prompt",
    response_column: ResponseColumn = "response",
    template: Template = None,
    label_word: LabelWords = None,
    max_length: MaxLength = 512,
    split: str = "train",
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Ranks stored prompts as starting points for a task, read as the target's task.json or the options say."""
    from ..analysis.figures import similarity_figure
    from ..analysis.tables import print_similar
    from ..analysis.transfer import similar as rank
    from ..prompts.peft_files import read_prompt
    from ..tasks.tables import load_rows
    from ..tasks.task import TASK_FILE, Task

    rows = load_rows(data, split) if data is not None else []
    own = None if target is None else next(iter(_folders(target).values()))
    chosen = None
    if own is not None and (own / TASK_FILE).is_file():
        chosen = Task.load(own)
    elif rows:
        chosen = task_of_options(
            rows, task, text_column, label_column, prompt_column, response_column, template, label_word
        )
        chosen.max_length = max_length
    tuned, tokenizer, folders = _load_prompts(prompt, model, dtype, device)
    sources = {n: tuned.prompts[n].detach() for n in folders if own is None or folders[n].resolve() != own.resolve()}
    for n in sources:
        if (
            chosen is not None
            and (folders[n] / TASK_FILE).is_file()
            and Task.load(folders[n]).special_tokens != chosen.special_tokens
        ):
            raise ValueError(f"--prompt must hold prompts on the target's side of BOS, got {n!r} on the other")
    with progress_bar(len(rows) * (1 + len(sources))) as advance:
        found = rank(
            tuned,
            tokenizer,
            chosen,
            rows,
            sources,
            None if own is None else read_prompt(own)[0],
            batch_size=batch_size,
            progress=advance,
        )
    print_similar(found, Console())
    _write([source.to_json() for source in found], output)
    _draw(lambda: similarity_figure(found), figure)


# --- helpers ---


def task_of_options(
    rows: list[dict[str, Any]],
    kind: TaskKind,
    text_column: str,
    label_column: str,
    prompt_column: str,
    response_column: str,
    template: str | None,
    label_word: list[str] | None,
) -> Any:
    """The task that options describe; rows without a label do not make one."""
    from ..tasks.task import classification_task, generation_task

    if template is not None:
        template = template.replace("\\n", "\n")
    if kind is TaskKind.generation:
        return generation_task(prompt_column=prompt_column, response_column=response_column, template=template)
    labelled = [row for row in rows if row.get(label_column) is not None]
    return classification_task(
        labelled or rows,
        text_column=text_column,
        label_column=label_column,
        template=template,
        label_words=_pairs(label_word) if label_word else None,
    )


def _folders(prompt: Path) -> dict[str, Path]:
    """The prompts of a folder, by name."""
    from ..prompts.peft_files import prompt_folders

    return {folder.resolve().name: folder for folder in prompt_folders(prompt)}


def _task_of(folders: dict[str, Path], name: str | None) -> Any:
    from ..tasks.task import Task

    if name is None:
        raise ValueError(f"--ablate must name one of the {len(folders)} prompts: {list(folders)}")
    if name not in folders:
        raise ValueError(f"--ablate must be one of {list(folders)}, got {name!r}")
    return Task.load(folders[name])


def _load_prompts(prompt: Path, model: str | None, dtype: str, device: str | None) -> tuple[Any, Any, dict[str, Path]]:
    """A model with the prompts of a folder, its tokenizer, and the prompts' folders."""
    from ..hf.loading import load_base_model
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import DEEP, peft_type
    from .inference import _prompt_names

    folders = _folders(prompt)
    deep = [own for own, folder in folders.items() if peft_type(folder) == DEEP]
    if deep:
        raise ValueError(
            f"--prompt must hold plain prompts, vectors like those of tokens, got deep ones: {', '.join(deep)}"
        )
    _, name = _prompt_names(prompt, model)
    base, tokenizer = load_base_model(name, dtype, device)
    tuned = SoftPromptModel(base)
    for own, folder in folders.items():
        tuned.load_prompt(folder, own)
        tuned.prompts.plain_parameter(own, purpose="this command")
    return tuned, tokenizer, folders


def _write(values: Any, output: Path | None) -> None:
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    console.print(f"wrote {output}")


def _draw(make: Any, path: Path | None) -> None:
    from ..base.figures import save_figure

    if path is not None:
        console.print(f"drew {save_figure(make(), path)}")
