"""Saving the prompts of a model, and loading them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..base.errors import either
from ..base.locations import located
from ..hf.adapters import adapter_parameters
from ..hf.architecture import check_supported, compiled_in_place
from ..hf.heads import head_state, path_inside
from ..prompts.base_identity import base_facts, check_base
from ..prompts.card import update_card
from ..prompts.checkpoints import prompt_names, read_checkpoint, read_trained_weights
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..prompts.head_files import MODULES
from ..prompts.hub_upload import push_to_hub
from ..prompts.peft_files import (
    P_TUNING,
    PLAIN,
    UPDATED,
    frozen_tokens,
    peft_type,
    prompts_by_name,
    read_prompt,
    read_updated_prompt,
    safe_name,
    write_prompt,
)
from ..prompts.placement import freeze_first
from .head_weights import check_one_head, install_head, stored_head
from .model_interface import BASE_PREFIX, ModelInterface

if TYPE_CHECKING:
    from typing import Self

    from huggingface_hub import CommitInfo
    from typing_extensions import Unpack

    from ..prompts.initialization import InitOptions


class PromptFiles(ModelInterface):
    """The part of :class:`SoftPromptModel` that adds prompts, also from files, and writes them."""

    prompts: FastSoftPrompt

    def add_prompt(
        self,
        name: str,
        num_virtual_tokens: int | None = None,
        *,
        init: str | Tensor | PathLike[str] = "random",
        **options: Unpack[InitOptions],
    ) -> nn.Parameter:
        """Adds a prompt and returns its parameter [P, D]; arguments as in :meth:`FastSoftPrompt.add_prompt`."""
        embedding = self.get_input_embeddings()
        return self.prompts.add_prompt(name, num_virtual_tokens, init=init, embedding=embedding, **options)

    def save_pretrained(
        self, directory: PathLike[str] | str, names: Sequence[str] | None = None, *, peft_type: str | None = None
    ) -> None:
        """Writes each prompt as a PEFT adapter folder, ``directory/<name>/``. The base model is not written.

        A head that is trained, or that came with a prompt, is written with each prompt, as PEFT does it. A folder that
        has a ``task.json`` also gets a model card. PEFT refuses a prompt that has a token update because it does not
        know them.

        Args:
            names: write only these.
            peft_type: PEFT's name of the method: "PROMPT_TUNING" (the same as None), or "P_TUNING".
        """
        kind = checked_type(peft_type, (PLAIN, P_TUNING)) or PLAIN
        facts = base_facts(self.base_model)
        head = head_state(self.base_model, self.head_modules) if self.saves_head else None
        if head:
            facts[MODULES] = list(self.head_modules)
        for name in self.prompts.names if names is None else names:
            update = self.prompts.token_update(name)
            write_prompt(Path(directory) / name, self.prompts.snapshot(name), facts, update, kind=kind, head=head)
            update_card(Path(directory) / name)

    def push_to_hub(
        self, repo_id: str, names: Sequence[str] | None = None, *, peft_type: str | None = None, **options: Any
    ) -> CommitInfo:
        """Uploads prompts to the Hub in one commit: one into the repository itself, several into a folder each.

        A prompt that ``tune`` saved has a task and scores beside it; push its folder, so that they are uploaded too:
        :func:`softprompt_fast.prompts.push_to_hub`.

        Args:
            repo_id: such as ``user/repo``.
            names: upload only these.
            peft_type: as in :meth:`save_pretrained`.
            options: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr`` and
                ``base_model``, as in :func:`softprompt_fast.prompts.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, names, peft_type=peft_type)
            return push_to_hub(folder, repo_id, **options)

    def load_prompt(
        self,
        folder: PathLike[str] | str,
        name: str | None = None,
        *,
        force: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> nn.Parameter:
        """Adds the prompt of an adapter folder, ours or PEFT's, or of a file, ready to be trained further.

        A token update is loaded too, and positions that are not trained stay so. The model gets the head that was saved
        with the prompt.

        Args:
            folder: also the name of a version in the registry, such as ``sentiment@production``, a repository on the
                Hub, such as ``user/repo``, a task of a folder with several, such as ``folder#2``, or any file that
                :meth:`add_prompt` reads.
            name: None: the folder's name, with ``-`` for characters that a name cannot have.
            force: also load a prompt that was tuned on other weights than the model's, or with another head than that
                of the model's other prompts, which then use this one. A prompt that has no head then uses theirs.
            revision: branch, tag or commit of a repository on the Hub.
            token: for a private repository; None: the one of the Hub's login.

        Raises:
            ValueError: the prompt was tuned on other weights, or for a model of another size; the folder holds several
                tasks and none is named; its head is not that of the model's other prompts, those of other objects over
                the model included.
        """
        folder = located(folder, revision=revision, token=token)
        if folder.is_file():
            return self.add_prompt(name or safe_name(folder.stem), init=folder)
        check_base(folder, self.base_model, force=force)
        name = name or next(iter(prompts_by_name(folder)))
        head = stored_head(folder, self.base_model)
        if not force:
            check_one_head(folder, head, self.base_model, self, list(self.prompts.names))
        if peft_type(folder) != UPDATED:
            self.prompts.add_prompt(name, init=self.read_prompt(folder, loaded=head))
            parameter = freeze_first(self.prompts, name, frozen_tokens(folder))
        else:
            values, factors, config = read_updated_prompt(folder, loaded=head)
            parameter = self.prompts.add_prompt(name, init=self._fitting(folder, values, config))
            self.prompts.set_token_update(name, *factors)
        self._take_head(head)
        return parameter

    def _take_head(self, head: dict[str, Tensor]) -> None:
        """Gives the model the weights of a head. They are saved with its prompts from now on."""
        if head:
            self._own_head(install_head(head, self.base_model))

    def read_prompt(self, folder: PathLike[str] | str, *, loaded: Collection[str] = ()) -> Tensor:
        """[P, D] float32, the prompt of an adapter folder.

        Args:
            loaded: names of tensors of the model that the caller loads; one log line names others that the folder has.

        Raises:
            ValueError: the prompt was made for a model of another size, or has a token update.
        """
        values, config = read_prompt(folder, loaded=loaded)
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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike[str] | str | None = None,
        **options: Any,
    ) -> Self:
        """A model with the prompts of a directory: an adapter folder, a folder of them, or a checkpoint of Trainer.

        A checkpoint also holds the adapters (LoRA and others) that were trained with ``train_adapters=True``. The model
        must have adapters of the same shape and names; they get these weights.

        Args:
            directory: also the name of a version in the registry, such as ``sentiment@production``, or a repository on
                the Hub, such as ``user/repo``.
            names: load only these.
            force: also load prompts that were tuned on other weights than the model's, or with several heads.
            revision: branch, tag or commit of a repository on the Hub.
            token: for a private repository; None: the one of the Hub's login.
            cache_dir: where the repository's files are kept; None: the Hub's cache.
            options: options of the constructor. A head that was saved with a prompt is trained further unless
                ``train_head`` is False.

        Raises:
            FileNotFoundError: there is no such prompt.
            ValueError: a prompt was tuned on other weights, or for a model of another size; the model lacks the
                adapters of a checkpoint.
        """
        directory = located(directory, revision=revision, token=token, cache_dir=cache_dir)
        state = read_checkpoint(directory)
        folders = prompts_by_name(directory) if state is None else {}
        stored = list(folders) if state is None else prompt_names(state)
        missing = set(names or ()) - set(stored) - {folder.name for folder in folders.values()}
        if missing:
            raise FileNotFoundError(f"{directory} has no prompt named {', '.join(sorted(missing))}")
        chosen = {n: folder for n, folder in folders.items() if names is None or {n, folder.name} & set(names)}
        sources = [directory] if state is not None else list(chosen.values())
        model = compiled_in_place(model)
        check_supported(model)
        if options.get("train_head") is None and any(stored_head(source, model) for source in sources):
            options["train_head"] = True
        tuned = cls(model, **options)
        if state is not None:
            head = stored_head(directory, model)
            adapters = tuned._stored_adapters(directory, head)
            if not force:
                check_one_head(directory, head, model, tuned, [])
            tuned.prompts.load_state_dict(state)
            tuned._take_head(head)
            tuned.load_state_dict(adapters, strict=False)
            for name in set(stored) - set(stored if names is None else names):
                tuned.prompts.remove_prompt(name)
        for name, folder in chosen.items():
            tuned.load_prompt(folder, name, force=force)
        return tuned

    def _stored_adapters(self, checkpoint: Path, head: Collection[str]) -> dict[str, Tensor]:
        """The adapters that a checkpoint holds beside prompts and a head, by their names in ``state_dict``.

        Args:
            head: names of the head's tensors in the model.

        Raises:
            ValueError: the checkpoint holds other weights, or adapters that the model lacks.
        """
        adapters = {id(parameter) for parameter in adapter_parameters(self.base_model)}
        own = {key: id(parameter) in adapters for key, parameter in self.named_parameters(remove_duplicate=False)}
        start = BASE_PREFIX + path_inside(self.base_model)
        loaded = {start + name for name in head}
        state = {key: value for key, value in read_trained_weights(checkpoint).items() if key not in loaded}
        for key in sorted(state):
            if key not in own:
                raise ValueError(
                    f"`model` must have the adapters that {checkpoint} holds, but it has no {key!r}; load or add them "
                    "first"
                )
            if not own[key]:
                raise ValueError(
                    f"{checkpoint} must hold prompts, adapters and the weights of a head, got {key!r}, a weight of the "
                    "base model"
                )
        return state


def checked_type(peft_type: str | None, kinds: Sequence[str]) -> str | None:
    """A method that prompts are written as, None for the usual one.

    Raises:
        ValueError: not one of `kinds`.
    """
    if peft_type is not None and peft_type not in kinds:
        raise ValueError(f"`peft_type` must be {either(kinds)}, got {peft_type!r}")
    return peft_type
