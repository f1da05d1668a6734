"""``evaluate``: scores a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..base.extras import require
from ..base.locations import located
from ..base.progress import progress_bar
from .data import DataOptions
from .options import DATA, Adapter, BatchSize, Data, Device, Dtype, OptionalModel, PromptFolder, Quantize, with_options
from .output import console
from .prompts import (
    Force,
    TaskTemplate,
    TaskWords,
    ensemble_members,
    folders_by_name,
    given_task,
    load_tuned,
    refuse_heads,
)


@with_options("data_options_of", DataOptions)
def evaluate(
    prompt: PromptFolder,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    model: OptionalModel = None,
    adapter: Adapter = None,
    force: Force = False,
    template: TaskTemplate = None,
    label_word: TaskWords = None,
    target_column: Annotated[
        str | None,
        typer.Option(
            help="For a prompt without task.json: column of the label or of the response. By default label (with "
            "--label-word) or response.",
            rich_help_panel=DATA,
        ),
    ] = None,
    ensemble: Annotated[bool, typer.Option(help="Score the common decision of the folder's prompts.")] = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
) -> None:
    """Scores a tuned prompt, or an ensemble, on labelled rows; prints JSON."""
    data_options = data_options_of()
    require("train", "datasets", "sklearn", purpose="evaluate")
    from ..evaluation.ensembles import evaluate_ensemble
    from ..evaluation.predictions import evaluate as score_prompt
    from ..tasks.examples import complete_rows

    prompt = located(prompt)
    loading: dict[str, Any] = {"adapter": adapter, "quantize": quantize}
    folders = folders_by_name(prompt)
    given = given_task(folders, template, label_word, target_column)
    rows = data_options.read(data)
    if ensemble and given is not None:
        raise ValueError("--template cannot be combined with --ensemble")
    if ensemble:
        refuse_heads(folders)
        members, combine = ensemble_members(prompt, list(folders))
        tuned, tokenizer, task = load_tuned(folders[members[0]], model, dtype, device, force=force, **loading)
        rows = complete_rows(task, rows)
        for name in members[1:]:
            tuned.load_prompt(folders[name], name, force=force)
        scores = evaluate_ensemble(tuned, tokenizer, task, rows, members, combine=combine, batch_size=batch_size)
    else:
        loading |= {"task": given, "heads": True}
        tuned, tokenizer, task = load_tuned(prompt, model, dtype, device, force=force, **loading)
        rows = complete_rows(task, rows)
        with progress_bar(len(rows), console) as advance:
            scores = score_prompt(tuned, tokenizer, task, rows, batch_size=batch_size, progress=advance)
    print(json.dumps(scores, indent=2))
