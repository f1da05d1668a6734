"""``generate``: continues the text of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .answers import (
    AnswersFile,
    BatchTokens,
    PromptNameColumn,
    Resume,
    answer_all,
    load_pipeline,
    names_of_rows,
    require_for_output,
)
from .data import read_rows
from .options import DATA, BatchSize, Data, Device, Dtype, OptionalModel, PromptFolders, Split
from .prompts import Force

GENERATION = "Generation"

TextColumn = Annotated[
    str,
    typer.Option(help="Column of the text, for rows whose prompt has no task that names it.", rich_help_panel=DATA),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel=GENERATION)]
DoSample = Annotated[
    bool, typer.Option(help="Draw tokens instead of taking the most probable ones.", rich_help_panel=GENERATION)
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="Divides the logits before tokens are drawn.", rich_help_panel=GENERATION),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Draw from the most probable tokens that together have this probability.",
        rich_help_panel=GENERATION,
    ),
]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams of beam search.", rich_help_panel=GENERATION)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends an answer. Repeat it for several texts.", rich_help_panel=GENERATION),
]
Seed = Annotated[int, typer.Option(help="Seed of the drawn tokens.", rich_help_panel=GENERATION)]


def generate(
    prompt: PromptFolders,
    data: Data,
    model: OptionalModel = None,
    force: Force = False,
    prompt_name_column: PromptNameColumn = None,
    text_column: TextColumn = "text",
    split: Split = "train",
    max_new_tokens: MaxNewTokens = 64,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    num_beams: NumBeams = 1,
    stop: Stop = None,
    seed: Seed = 0,
    output: AnswersFile = None,
    resume: Resume = False,
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 4096,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Continues each row's text, in the order of the rows."""
    require_for_output(output)
    from transformers import set_seed

    rows = read_rows(data, split)
    pipe = load_pipeline(
        prompt, model, batch_size=batch_size, batch_tokens=batch_tokens, dtype=dtype, device=device, force=force
    )
    names = names_of_rows(rows, prompt_name_column, pipe.bank.names)
    given = {"temperature": temperature, "top_p": top_p, "stop_strings": stop}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    options |= {key: value for key, value in given.items() if value is not None}
    set_seed(seed)

    def answer(part: Sequence[dict[str, Any]], used: Sequence[str | None]) -> list[dict[str, Any]]:
        texts: list[Any] = []
        for row, name in zip(part, used, strict=True):
            task = pipe.bank.task(name) if name is not None and name in pipe.bank else None
            if task is None and text_column not in row:
                raise ValueError(f"no column {text_column!r} in the data, which has {', '.join(row)}")
            texts.append(row if task is not None else str(row[text_column]))
        results = pipe.generate(texts, used, **options)
        return [{"generated": result["text"]} if "text" in result else result for result in results]

    answer_all(rows, names, answer, output, resume)
