"""Saving the prompts of a model, and loading them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..base.locations import located
from ..prompts.base_identity import base_facts, check_base
from ..prompts.checkpoints import prompt_names, read_checkpoint
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..prompts.peft_files import UPDATED, peft_type, prompts_by_name, read_prompt, read_updated_prompt, write_prompt
from .model_interface import ModelInterface

if TYPE_CHECKING:
    from typing import Self


class PromptFiles(ModelInterface):
    """The part of :class:`SoftPromptModel` that reads and writes files."""

    prompts: FastSoftPrompt

    def save_pretrained(self, directory: PathLike[str] | str, names: Sequence[str] | None = None) -> None:
        """Writes each prompt as a PEFT adapter folder, ``directory/<name>/``. The base model is not written.

        PEFT refuses a prompt that has a token update because it does not know them.
        """
        facts = base_facts(self.base_model)
        for name in self.prompts.names if names is None else names:
            write_prompt(Path(directory) / name, self.prompts.snapshot(name), facts, self.prompts.token_update(name))

    def load_prompt(self, folder: PathLike[str] | str, name: str | None = None, *, force: bool = False) -> nn.Parameter:
        """Adds the prompt of an adapter folder, ours or PEFT's, with its token update, ready to be trained further.

        Args:
            folder: also the name of a version in the registry, such as ``sentiment@production``.
            name: None: the folder's name, with ``-`` for characters that a name cannot have.
            force: also load a prompt that was tuned on other weights than the model's.

        Raises:
            ValueError: the prompt was tuned on other weights, or for a model of another size.
        """
        folder = located(folder)
        check_base(folder, self.base_model, force=force)
        name = name or next(iter(prompts_by_name(folder)))
        if peft_type(folder) != UPDATED:
            return self.prompts.add_prompt(name, init=self.read_prompt(folder))
        values, factors, config = read_updated_prompt(folder)
        parameter = self.prompts.add_prompt(name, init=self._fitting(folder, values, config))
        self.prompts.set_token_update(name, *factors)
        return parameter

    def read_prompt(self, folder: PathLike[str] | str) -> Tensor:
        """[P, D] float32, the prompt of an adapter folder.

        Raises:
            ValueError: the prompt was made for a model of another size, or has a token update.
        """
        values, config = read_prompt(folder)
        return self._fitting(folder, values, config)

    def _fitting(self, folder: PathLike[str] | str, values: Tensor, config: dict[str, Any]) -> Tensor:
        """The values, if they are as wide as this model's prompts."""
        width = self.prompts.embedding_dim
        if values.shape[1] != width:
            raise ValueError(
                f"{folder}: the prompt must have the model's hidden size {width}, got {values.shape[1]} "
                f"(made for {config.get('base_model_name_or_path')!r})"
            )
        return values

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: PathLike[str] | str,
        names: Sequence[str] | None = None,
        *,
        force: bool = False,
        **options: Any,
    ) -> Self:
        """A model with the prompts of a directory: an adapter folder, a folder of them, or a checkpoint of Trainer.

        Args:
            directory: also the name of a version in the registry, such as ``sentiment@production``.
            names: load only these.
            force: also load prompts that were tuned on other weights than the model's.
            options: options of the constructor.

        Raises:
            FileNotFoundError: there is no such prompt.
            ValueError: a prompt was tuned on other weights, or for a model of another size.
        """
        directory = located(directory)
        state = read_checkpoint(directory)
        folders = prompts_by_name(directory) if state is None else {}
        stored = list(folders) if state is None else prompt_names(state)
        missing = set(names or ()) - set(stored) - {folder.name for folder in folders.values()}
        if missing:
            raise FileNotFoundError(f"{directory} has no prompt named {', '.join(sorted(missing))}")
        tuned = cls(model, **options)
        if state is not None:
            tuned.prompts.load_state_dict(state)
            for name in set(stored) - set(stored if names is None else names):
                tuned.prompts.remove_prompt(name)
        for name, folder in folders.items():
            if names is None or {name, folder.name} & set(names):
                tuned.load_prompt(folder, name, force=force)
        return tuned
