"""``generate``: continues the text of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..base.locations import located
from .answers import (
    AnswersFile,
    BatchTokens,
    PromptNameColumn,
    Resume,
    answer_all,
    check_answers_file,
    load_pipeline,
    names_of_rows,
)
from .data import DataOptions
from .options import DATA, Adapter, BatchSize, Data, Device, Dtype, OptionalModel, PromptFolders, Quantize, with_options
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


@with_options("data_options_of", DataOptions)
def generate(
    prompt: PromptFolders,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    model: OptionalModel = None,
    adapter: Adapter = None,
    force: Force = False,
    prompt_name_column: PromptNameColumn = None,
    text_column: TextColumn = "text",
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
    quantize: Quantize = None,
    device: Device = None,
) -> None:
    """Continues each row's text, in the order of the rows.

    The status is 0 if all rows are answered, 3 if some got an error, 1 if all did or nothing ran.
    """
    data_options = data_options_of()
    check_answers_file(output, data, resume)
    from transformers import set_seed

    from ..tasks.values import text_of

    prompt = located(prompt)
    rows = data_options.read(data)
    pipe = load_pipeline(
        prompt,
        model,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        adapter=adapter,
        quantize=quantize,
        dtype=dtype,
        device=device,
        force=force,
    )
    names = names_of_rows(rows, prompt_name_column, pipe.bank.names)
    given = {"temperature": temperature, "top_p": top_p, "stop_strings": stop}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    options |= {key: value for key, value in given.items() if value is not None}
    set_seed(seed)

    def answer(part: Sequence[dict[str, Any]], used: Sequence[str | None]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{} for _ in part]
        texts: dict[int, Any] = {}
        for i, (row, name) in enumerate(zip(part, used, strict=True)):
            has_task = name is not None and name in pipe.bank and pipe.bank.task(name) is not None
            if not has_task and text_column not in row:
                raise ValueError(f"no column {text_column!r} in the data, which has {', '.join(row)}")
            try:
                texts[i] = row if has_task else text_of(row[text_column], text_column)
            except ValueError as error:
                results[i] = {"error": str(error)}
        answers = pipe.generate(list(texts.values()), [used[i] for i in texts], **options)
        for i, answered in zip(texts, answers, strict=True):
            results[i] = {"generated": answered["text"]} if "text" in answered else answered
        return results

    answer_all(rows, names, answer, output, resume)
