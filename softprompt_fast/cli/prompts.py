"""Prompts of a folder for commands, and the model they were tuned on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .data import label_words
from .options import DATA, PROMPT
from .output import console

if TYPE_CHECKING:
    from ..inference.heads import HeadAnswers
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.task import Task


Force = Annotated[
    bool,
    typer.Option(help="Also use prompts that were tuned on other weights than the model's.", rich_help_panel=PROMPT),
]
TaskTemplate = Annotated[
    str | None,
    typer.Option(
        "--template",
        help=r"For a prompt without task.json: text that the model reads, with columns in braces; \n is a line break.",
        rich_help_panel=DATA,
    ),
]
TaskWords = Annotated[
    list[str] | None,
    typer.Option(
        "--label-word",
        help="For a prompt without task.json: word of a label, as LABEL=WORD. Repeat it for each label; without it, "
        "the prompt continues the text.",
        rich_help_panel=DATA,
    ),
]


def folders_by_name(prompt: Path) -> dict[str, Path]:
    """The folder of each prompt of a folder."""
    from ..prompts.peft_files import prompts_by_name

    return prompts_by_name(prompt)


def without_task(folders: dict[str, Path]) -> list[str]:
    """Names of the prompts that have no task.json."""
    from ..tasks.task import TASK_FILE

    return [name for name, folder in folders.items() if not (folder / TASK_FILE).is_file()]


def given_task(
    folders: dict[str, Path], template: str | None, words: list[str] | None, target_column: str | None = None
) -> Task | None:
    """The task of prompts without task.json, as the options describe it; None: no option is given.

    Raises:
        ValueError: label words without a template, or options for prompts that all have a task.
    """
    from ..tasks.task import Task

    if template is None:
        if words or target_column is not None:
            raise ValueError("--template must be given with --label-word and --target-column")
        return None
    if not without_task(folders):
        raise ValueError(f"--template cannot be combined with prompts that have a task.json: {', '.join(folders)}")
    template = template.replace("\\n", "\n")
    if words:
        return Task("classification", template, target_column or "label", label_words(words, template))
    return Task("generation", template, target_column or "response")


def base_model_name(prompt: Path, model: str | None) -> str:
    """The base model that was given, or the one that the prompts of a folder were tuned on."""
    from ..prompts.base_identity import one_base
    from ..prompts.peft_files import read_config
    from ..tasks.task import TASK_FILE, Task

    folders = folders_by_name(prompt).values()
    if model is not None:
        return model
    one_base(folders)
    names = [Task.load(folder).model for folder in folders if (folder / TASK_FILE).is_file()]
    names += [read_config(folder, None).get("base_model_name_or_path") for folder in folders]
    for name in names:
        if name:
            return name
    raise ValueError("--model must be given, because the prompts do not say which model they were tuned on")


def load_tuned(
    prompt: Path,
    model: str | None,
    dtype: str,
    device: str | None,
    *,
    force: bool = False,
    task: Task | None = None,
    heads: bool = False,
    adapter: str | None = None,
    quantize: str | None = None,
) -> tuple[SoftPromptModel, Any, Task]:
    """A model with the one prompt of a folder, its tokenizer, and the prompt's task.

    Args:
        force: also load a prompt that was tuned on other weights than the model's.
        task: the task of a prompt that has no task.json.
        heads: also take a prompt that was tuned with a head.
        adapter, quantize: as for :func:`load_base_model`.

    Raises:
        ValueError: a folder without one prompt, or a prompt with a head that the command does not take.
    """
    from dataclasses import replace

    from ..hf.loading import load_base_model
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import is_deep
    from ..tasks.task import TASK_FILE, Task

    folders = folders_by_name(prompt)
    if task is not None or (len(folders) == 1 and without_task(folders)):
        if len(folders) != 1:
            raise ValueError(f"--prompt must hold one prompt, got {', '.join(folders)}")
        ((name, folder),) = folders.items()
        if task is None:
            raise ValueError(f"--template and --label-word must be given, because prompt {name!r} has no task.json")
        task = replace(task, prompt=name)
    else:
        task = Task.load(prompt)
        folder = prompt if (prompt / TASK_FILE).is_file() else prompt / task.prompt
    if not heads:
        refuse_heads({task.prompt: folder})
    if task.head is not None:
        refuse_with_head(adapter, quantize)
        tuned, tokenizer = load_with_head({task.prompt: folder}, task, model, dtype, device, force=force)
        return tuned, tokenizer, task
    loading: dict[str, Any] = {"adapter": adapter, "quantize": quantize, "console": console}
    base, tokenizer = load_base_model(base_model_name(folder, model), dtype, device, **loading)
    tuned = (DeepPromptModel if is_deep(folder) else SoftPromptModel)(base)
    tuned.load_prompt(folder, task.prompt, force=force)
    return tuned, tokenizer, task


def tasks_with_heads(folders: dict[str, Path]) -> dict[str, Task]:
    """The tasks of the prompts that were tuned with a head."""
    from ..tasks.task import Task

    bare = without_task(folders)
    tasks = {name: Task.load(folder) for name, folder in folders.items() if name not in bare}
    return {name: task for name, task in tasks.items() if task.head is not None}


def refuse_heads(folders: dict[str, Path]) -> None:
    """Refuses prompts that were tuned with a head.

    Raises:
        ValueError: naming a prompt and its head.
    """
    for name, task in tasks_with_heads(folders).items():
        assert task.head is not None
        raise ValueError(
            f"--prompt must hold prompts of language-modelling heads, got {name!r} of a {task.head.name} head; "
            "evaluate and predict take it"
        )


def load_with_head(
    folders: dict[str, Path], task: Task, model: str | None, dtype: str, device: str | None, *, force: bool
) -> tuple[SoftPromptModel, Any]:
    """A model with the head of a task and the prompts of the folders, and its tokenizer.

    Raises:
        ValueError: neither the model nor a prompt's folder has the head.
    """
    from ..hf.head_loading import load_model_with_head
    from ..models.head_weights import stored_head
    from ..models.soft_prompt_model import SoftPromptModel

    assert task.head is not None
    name = base_model_name(next(iter(folders.values())), model)
    loaded = load_model_with_head(name, task.head.name, task.labels, dtype, device, console=console)
    tuned = SoftPromptModel(loaded.model, train_head=False)
    for prompt, folder in folders.items():
        if loaded.fresh and not stored_head(folder, loaded.model):
            raise ValueError(f"{folder} must hold the head {task.head.name}, which {name} does not have")
        tuned.load_prompt(folder, prompt, force=force)
    return tuned, loaded.tokenizer


def refuse_with_head(adapter: str | None, quantize: str | None) -> None:
    """Refuses options for loading that a model with a task head does not have.

    Raises:
        ValueError: naming the option.
    """
    for flag, value in {"--adapter": adapter, "--quantize": quantize}.items():
        if value is not None:
            raise ValueError(f"{flag} cannot be combined with a task head (--head)")


def load_head_answers(
    folders: dict[str, Path],
    tasks: dict[str, Task],
    model: str | None,
    *,
    batch_size: int,
    batch_tokens: int,
    dtype: str,
    device: str | None,
    force: bool = False,
) -> HeadAnswers:
    """What answers rows with the prompts of a folder and their head."""
    from ..inference.heads import HeadAnswers, check_one_head

    check_one_head(tasks)
    tuned, tokenizer = load_with_head(folders, next(iter(tasks.values())), model, dtype, device, force=force)
    return HeadAnswers(tuned, tokenizer, tasks, max_batch_rows=batch_size, max_batch_tokens=batch_tokens)


def load_plain_prompts(
    prompt: Path, model: str | None, dtype: str, device: str | None, *, force: bool = False
) -> tuple[SoftPromptModel, Any, dict[str, Path]]:
    """A model with all prompts of a folder, its tokenizer, and the prompts' folders.

    Raises:
        ValueError: a deep prompt, or one with a token update.
    """
    from ..hf.loading import load_base_model
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import is_deep

    folders = folders_by_name(prompt)
    refuse_heads(folders)
    deep = [name for name, folder in folders.items() if is_deep(folder)]
    if deep:
        raise ValueError(
            f"--prompt must hold plain prompts (vectors like those of tokens), got deep prompts: {', '.join(deep)}"
        )
    base, tokenizer = load_base_model(base_model_name(prompt, model), dtype, device, console=console)
    tuned = SoftPromptModel(base)
    for name, folder in folders.items():
        tuned.load_prompt(folder, name, force=force)
        tuned.prompts.plain_parameter(name, purpose="this command")
    return tuned, tokenizer, folders


def ensemble_members(folder: Path, known: list[str]) -> tuple[list[str], str]:
    """An ensemble's prompts and how they decide: by its file, or all prompts of the folder by mean probability."""
    file = folder / "ensemble.json"
    if not file.is_file():
        return known, "mean_probability"
    facts = json.loads(file.read_text())
    return facts["members"], facts["combine"]
