"""Prompts of a folder for commands, and the model they were tuned on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import console

if TYPE_CHECKING:
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.task import Task


def folders_by_name(prompt: Path) -> dict[str, Path]:
    """The folder of each prompt of a folder."""
    from ..prompts.peft_files import prompt_folders

    return {folder.resolve().name: folder for folder in prompt_folders(prompt)}


def base_model_name(prompt: Path, model: str | None) -> str:
    """The base model that was given, or the one that the prompts of a folder were tuned on."""
    from ..prompts.peft_files import read_config
    from ..tasks.task import TASK_FILE, Task

    folders = folders_by_name(prompt).values()
    if model is not None:
        return model
    names = [Task.load(folder).model for folder in folders if (folder / TASK_FILE).is_file()]
    names += [read_config(folder, None).get("base_model_name_or_path") for folder in folders]
    for name in names:
        if name:
            return name
    raise ValueError("--model must be given, because the prompts do not say which model they were tuned on")


def load_tuned(prompt: Path, model: str | None, dtype: str, device: str | None) -> tuple[SoftPromptModel, Any, Task]:
    """A model with the one prompt of a folder, its tokenizer, and the prompt's task."""
    from ..hf.loading import load_base_model
    from ..models.deep_prompt_model import DeepPromptModel
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import DEEP, peft_type
    from ..tasks.task import TASK_FILE, Task

    task = Task.load(prompt)
    folder = prompt if (prompt / TASK_FILE).is_file() else prompt / task.prompt
    base, tokenizer = load_base_model(base_model_name(folder, model), dtype, device, console=console)
    tuned = (DeepPromptModel if peft_type(folder) == DEEP else SoftPromptModel)(base)
    tuned.load_prompt(folder, task.prompt)
    return tuned, tokenizer, task


def load_plain_prompts(
    prompt: Path, model: str | None, dtype: str, device: str | None
) -> tuple[SoftPromptModel, Any, dict[str, Path]]:
    """A model with all prompts of a folder, its tokenizer, and the prompts' folders.

    Raises:
        ValueError: a deep prompt, or one with a token update.
    """
    from ..hf.loading import load_base_model
    from ..models.soft_prompt_model import SoftPromptModel
    from ..prompts.peft_files import DEEP, peft_type

    folders = folders_by_name(prompt)
    deep = [name for name, folder in folders.items() if peft_type(folder) == DEEP]
    if deep:
        raise ValueError(
            f"--prompt must hold plain prompts (vectors like those of tokens), got deep prompts: {', '.join(deep)}"
        )
    base, tokenizer = load_base_model(base_model_name(prompt, model), dtype, device, console=console)
    tuned = SoftPromptModel(base)
    for name, folder in folders.items():
        tuned.load_prompt(folder, name)
        tuned.prompts.plain_parameter(name, purpose="this command")
    return tuned, tokenizer, folders


def ensemble_members(folder: Path, known: list[str]) -> tuple[list[str], str]:
    """An ensemble's prompts and how they decide: by its file, or all prompts of the folder by mean probability."""
    file = folder / "ensemble.json"
    if not file.is_file():
        return known, "mean_probability"
    facts = json.loads(file.read_text())
    return facts["members"], facts["combine"]
