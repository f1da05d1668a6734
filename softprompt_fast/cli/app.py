"""The command line: thin, every command is a call of the library. Errors people cause are one line, not a traceback."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Tune and use soft prompts for frozen language models.", no_args_is_help=True, add_completion=False
)
console = Console(stderr=True)


class TaskKind(str, Enum):
    classification = "classification"
    generation = "generation"


def main() -> None:
    """Entry point of ``softprompt-fast``."""
    from ..ops.extension.build import BuildUnavailable

    try:
        app()
    except (LookupError, ValueError, TypeError, OSError, ArithmeticError, BuildUnavailable, ImportError) as error:
        if os.environ.get("SOFTPROMPT_FAST_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        console.print(f"[bold red]error:[/bold red] {escape(str(text))}", highlight=False)
        console.print("SOFTPROMPT_FAST_TRACEBACK=1 shows where it was raised.", style="dim")
        sys.exit(1)


# --- the extension ---


@app.command()
def info() -> None:
    """Versions, compiler, CUDA, cache, and which backend is active and why."""
    from .info import report

    for name, value in report().items():
        print(f"{name:<18} {value}")


@app.command()
def build() -> None:
    """Compiles the native extension now, even after an earlier failure."""
    from ..ops.extension import build as _build

    module = _build.load(retry=True)
    print(f"ready: {module.__file__}")


@app.command()
def clean() -> None:
    """Removes cached builds of the extension."""
    from ..ops.extension import build as _build

    removed = _build.clean()
    print(f"removed {len(removed)} entries from {_build.cache_directory() / 'build'}")


# --- tuning ---

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the base model.")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model, if not the one the prompt was tuned on.")
]
Data = Annotated[str, typer.Option("--data", "-d", help="jsonl, json, csv, tsv or parquet file, or a hub data set.")]
PromptFolder = Annotated[Path, typer.Option("--prompt", "-p", help="A run's output folder, or the prompt's own.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")]


@app.command()
def evaluate(
    prompt: PromptFolder,
    data: Data,
    model: OptionalModel = None,
    split: str = "train",
    ensemble: Annotated[bool, typer.Option(help="The folder's prompts decide together.")] = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Scores a tuned prompt, or an ensemble, on labelled rows; prints JSON."""
    from ..evaluation.ensembles import evaluate_ensemble
    from ..evaluation.predictions import evaluate as score
    from ..tasks.tables import load_rows

    rows = load_rows(data, split)
    if ensemble:
        from ..prompts.peft_files import prompt_folders
        from .inference import ensemble_members

        folders = prompt_folders(prompt)
        members, how = ensemble_members(prompt, [folder.resolve().name for folder in folders])
        tuned, tokenizer, task = _load_tuned(prompt / members[0], model, dtype, device)
        for name in members[1:]:
            tuned.load_prompt(prompt / name, name)
        found = evaluate_ensemble(tuned, tokenizer, task, rows, members, combine=how, batch_size=batch_size)
        print(json.dumps(found, indent=2))
        return
    tuned, tokenizer, task = _load_tuned(prompt, model, dtype, device)
    with progress_bar(len(rows)) as advance:
        print(json.dumps(score(tuned, tokenizer, task, rows, batch_size=batch_size, progress=advance), indent=2))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("softprompt-demo"),
    steps: Annotated[int, typer.Option(min=1)] = 120,
    seed: int = 0,
    rows: Annotated[int, typer.Option(min=50, help="Held-out reviews to score.")] = 600,
) -> None:
    """Tunes a prompt for movie-review sentiment on SmolLM2-135M: real model, real data, no account, no GPU."""
    from ..demo import run_demo

    run_demo(output, steps=steps, seed=seed, held_out=rows, console=console)


# --- helpers ---


def _pairs(values: list[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        label, equals, word = value.partition("=")
        if not equals or not word:
            raise ValueError(f"--label-word must be LABEL=WORD, got {value!r}")
        pairs[label] = word if word.startswith(" ") else f" {word}"
    return pairs


def _load_tuned(folder: Path, model: str | None, dtype: str, device: str | None) -> tuple[Any, Any, Any]:
    from ..hf.loading import load_base_model
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import DEEP, peft_type
    from ..tasks.task import Task
    from .inference import _prompt_names

    task = Task.load(folder)
    own = folder if (folder / "task.json").is_file() else folder / task.prompt
    base, tokenizer = load_base_model(_prompt_names(own, model)[1], dtype, device)
    tuned = (DeepPromptModel if peft_type(own) == DEEP else SoftPromptModel)(base)
    tuned.load_prompt(own, task.prompt)
    return tuned, tokenizer, task


class progress_bar:
    """A bar over rows, on the error stream."""

    def __init__(self, total: int) -> None:
        from rich.progress import Progress

        self._bar = Progress(console=console)
        self._task = self._bar.add_task("rows", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda done: self._bar.advance(self._task, done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


# They add their commands to `app`.
from . import analysis as cli_analysis  # noqa: E402, F401
from . import compare as cli_compare  # noqa: E402, F401
from . import inference as cli_inference  # noqa: E402, F401
from . import search as cli_search  # noqa: E402, F401
from . import train as cli_train  # noqa: E402, F401

if __name__ == "__main__":
    main()
