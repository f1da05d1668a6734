"""``predict``: answers rows as their prompts' tasks ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.extras import require
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
    write_file,
)
from .data import DataOptions
from .options import (
    MACHINE,
    OUTPUT,
    PROMPT,
    Adapter,
    BatchSize,
    Data,
    Device,
    Dtype,
    OptionalModel,
    PromptFolders,
    Quantize,
    completion,
    with_options,
)
from .output import check_outputs
from .prompts import (
    Force,
    TaskTemplate,
    TaskWords,
    base_model_name,
    ensemble_members,
    folders_by_name,
    given_task,
    load_head_answers,
    refuse_with_head,
    tasks_with_heads,
    without_task,
)

if TYPE_CHECKING:
    from ..tasks.task import Task

ENGINES = ("local", "ray")
LONGEST = 64
"""Tokens of an answer, unless told otherwise."""

Ensemble = Annotated[
    bool, typer.Option(help="Let all prompts of the folder decide together on each row.", rich_help_panel=PROMPT)
]
Combine = Annotated[
    str | None,
    typer.Option(
        help="How an ensemble decides: mean_probability, mean_logit or majority. By default as its ensemble.json says.",
        rich_help_panel=PROMPT,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer in tokens, for tasks that generate text.", rich_help_panel=PROMPT)
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log", help="Also append each row's observations to this file, for monitor --log.", rich_help_panel=OUTPUT
    ),
]
LogTexts = Annotated[
    str,
    typer.Option(
        help="Whether --log holds the texts too; without them it holds their digests.",
        metavar="yes|no",
        autocompletion=completion(("yes", "no")),
        rich_help_panel=OUTPUT,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="local answers in this process; ray spreads the rows over workers.",
        metavar="|".join(ENGINES),
        autocompletion=completion(ENGINES),
        rich_help_panel=MACHINE,
    ),
]
Workers = Annotated[
    int,
    typer.Option(min=1, help="Workers of --engine ray. Each has its own copy of the model.", rich_help_panel=MACHINE),
]


@with_options("data_options_of", DataOptions)
def predict(
    prompt: PromptFolders,
    data: Data,
    data_options_of: Callable[..., DataOptions],
    model: OptionalModel = None,
    adapter: Adapter = None,
    force: Force = False,
    prompt_name_column: PromptNameColumn = None,
    template: TaskTemplate = None,
    label_word: TaskWords = None,
    ensemble: Ensemble = False,
    combine: Combine = None,
    max_new_tokens: MaxNewTokens = LONGEST,
    output: AnswersFile = None,
    resume: Resume = False,
    log: LogFile = None,
    log_texts: LogTexts = "yes",
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 4096,
    engine: Engine = "local",
    workers: Workers = 2,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
) -> None:
    """Adds a prediction to each row, as its prompt's task asks, in the order of the rows.

    The status is 0 if all rows are answered, 3 if some got an error, 1 if all did or nothing ran.
    """
    data_options = data_options_of()
    _check(engine, ensemble, prompt_name_column, output, data, log, log_texts)
    check_answers_file(output, data, resume)
    from ..inference.answer_log import AnswerLog
    from ..inference.files import answer_rows

    prompt = located(prompt)
    rows = data_options.read(data)
    folders = folders_by_name(prompt)
    task = given_task(folders, template, label_word)
    used = set(list(folders) if ensemble else names_of_rows(rows, prompt_name_column, list(folders)))
    bare = [name for name in without_task(folders) if name in used]
    if bare and task is None:
        raise ValueError(
            f"--template and --label-word must be given, because {', '.join(map(repr, bare))} has no task.json"
        )
    options = {"max_new_tokens": max_new_tokens}
    settings: dict[str, Any] = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    settings |= {"dtype": dtype, "device": device}
    if heads := tasks_with_heads(folders):
        _check_heads(heads, folders, ensemble, engine, log, max_new_tokens)
        refuse_with_head(adapter, quantize)
        names = names_of_rows(rows, prompt_name_column, list(folders))
        answer_all(rows, names, load_head_answers(folders, heads, model, force=force, **settings), output, resume)
        return
    settings |= {"adapter": adapter, "quantize": quantize}
    if engine == "ray":
        from ..inference.ray_engine import RayAnswers

        assert output is not None
        names = names_of_rows(rows, prompt_name_column, list(folders))
        base = base_model_name(prompt, model)
        distributed = RayAnswers(rows, names, prompt, base, workers, options, settings, task=task, force=force)
        write_file(rows, distributed, output, resume)
        return
    pipe = load_pipeline(prompt, model, force=force, task=task, **settings)
    if ensemble:
        members, how = ensemble_members(prompt, pipe.bank.names)

        def decide(part: Any, _: Any) -> Any:
            return pipe.classify(part, ensemble=members, combine=combine or how)

        answer_all(rows, [None] * len(rows), decide, output, resume)
        return
    names = names_of_rows(rows, prompt_name_column, pipe.bank.names)
    answers = None if log is None else AnswerLog(log, pipe, folders, texts=log_texts == "yes")

    def answer(part: Any, used: Any) -> Any:
        results = answer_rows(pipe, part, used, options)
        if answers is not None:
            answers.write(part, used, results)
        return results

    answer_all(rows, names, answer, output, resume)


def _check_heads(
    heads: dict[str, Task], folders: dict[str, Path], ensemble: bool, engine: str, log: Path | None, max_new_tokens: int
) -> None:
    """Refuses options that cannot be combined with prompts of a head, and other prompts beside them."""
    given = {
        "--ensemble": ensemble,
        "--engine ray": engine == "ray",
        "--log": log is not None,
        "--max-new-tokens": max_new_tokens != LONGEST,
    }
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} cannot be combined with prompts of a head: {', '.join(heads)}")
    if others := [name for name in folders if name not in heads]:
        raise ValueError(f"--prompt must hold prompts of one head, got {', '.join(others)} without a head")


def _check(
    engine: str,
    ensemble: bool,
    prompt_name_column: str | None,
    output: Path | None,
    data: str,
    log: Path | None,
    log_texts: str,
) -> None:
    """Checks options that cannot be combined, and the packages and the file that they need."""
    if engine not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if ensemble and prompt_name_column is not None:
        raise ValueError("--ensemble cannot be combined with --prompt-name-column")
    if ensemble and engine == "ray":
        raise ValueError("--ensemble cannot be combined with --engine ray")
    if log_texts not in ("yes", "no"):
        raise ValueError(f"--log-texts must be yes or no, got {log_texts!r}")
    if log is not None and (ensemble or engine == "ray"):
        raise ValueError(f"--log cannot be combined with {'--ensemble' if ensemble else '--engine ray'}")
    if log is not None:
        check_outputs([log], [Path(data), *([output] if output is not None else [])])
    if engine == "ray" and output is None:
        raise ValueError("--output must be given with --engine ray")
    if engine == "ray":
        require("ray", "ray", purpose="--engine ray")
