"""``SoftPromptModel``: a frozen transformers model with a bank of soft prompts in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..base.errors import Unsupported
from ..hf import architecture, generation
from ..packed.runner import ExecutionReport, PackedRunner
from ..prompts.base_identity import base_facts, check_base
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..prompts.peft_files import UPDATED, peft_type, prompts_by_name, read_prompt, read_updated_prompt, write_prompt
from .padded_runner import LossFunction, PaddedRunner

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..prompts.initialization import InitOptions

Result = TypeVar("Result")
EXECUTIONS = ("auto", "shared", "padded")
PADDED_OPTIONS = ("output_attentions", "use_cache")
"""Options of a model's forward whose results only the padded layout has."""


class SoftPromptModel(nn.Module):
    """Freezes a model and holds its soft prompts.

    ``forward`` returns what the model returns, with logits and hidden states aligned with ``input_ids``: position
    ``t`` of the output belongs to token ``t`` of the input, prompts are dropped, padding is zero. A row's numbers do
    not depend on the other rows of its batch or on where its padding is.

    Args:
        model: a transformers decoder, encoder or encoder-decoder; its parameters are frozen in place.
        prompts: a bank to use; None: an empty one, on the model's device.
        execution: one of:

            * "shared": each distinct prompt runs once per batch, padding never runs, and logits are computed only
              where they are read (``packed/runner.py``).
            * "padded": every row carries its prompt; for any architecture (``models/padded_runner.py``).
            * "auto": "shared" where that is exact, else "padded". One log line and :meth:`execution_report` say why.
        check: compare the first training and the first inference batch of "shared" with each row run alone.
        shared_text: "auto": tokens that all rows of a prompt share at their start (an instruction, examples) also run
            once; None: they run in every row.

    Raises:
        TypeError: the model's results would be wrong with a prompt in front of its input; with the reason.
    """

    refused_arguments: ClassVar[dict[str, str]] = {
        "inputs_embeds": "the prompt is put in front of the embeddings of `input_ids` here",
        "position_ids": "positions follow from the attention mask and the prompts' lengths",
        "past_key_values": "forward runs whole rows; `generate` handles the cache",
    }
    """Arguments of the model's forward that cannot be given here, and why."""

    def __init__(
        self,
        model: Any,
        prompts: FastSoftPrompt | None = None,
        *,
        execution: str = "auto",
        check: bool = True,
        shared_text: str | None = "auto",
    ) -> None:
        super().__init__()
        if execution not in EXECUTIONS:
            raise ValueError(f"`execution` must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if shared_text not in ("auto", None):
            raise ValueError(f"`shared_text` must be 'auto' or None, got {shared_text!r}")
        architecture.check_supported(model)
        model.requires_grad_(False)
        self.base_model: Any = model
        embedding = model.get_input_embeddings()
        width = self._prompt_width(model)
        if prompts is not None and prompts.embedding_dim != width:
            raise ValueError(f"`prompts` must have embedding_dim={width} like the model, got {prompts.embedding_dim}")
        self.prompts = prompts if prompts is not None else FastSoftPrompt(width, device=embedding.weight.device)
        self._traits = architecture.ForwardTraits.of(model)
        self.accepts_loss_kwargs = self._traits.any_keyword  # Trainer asks before it passes num_items_in_batch
        self.execution = execution
        self.runner = self._packed_runner(model, check, shared_text) if execution != "padded" else None
        """Runs the packed layout; None: padded execution was asked for."""
        if execution == "shared" and self.runner is not None and self.runner.unsupported:
            raise ValueError(f"execution='shared' is not exact for this model: {self.runner.unsupported}")

    @staticmethod
    def _prompt_width(model: Any) -> int:
        """Numbers of one virtual token."""
        width: int = model.get_input_embeddings().weight.shape[1]
        return width

    @staticmethod
    def _packed_runner(model: Any, check: bool, shared_text: str | None) -> PackedRunner:
        return PackedRunner(model, check=check, shared_text=shared_text)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base_model.get_input_embeddings().weight.device
        return device

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.base_model.get_input_embeddings()
        return embedding

    # --- prompts ---

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

    def remove_prompt(self, name: str) -> None:
        self.prompts.remove_prompt(name)

    # --- running ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        num_targets: int | None = None,
        return_logits: bool | None = None,
        prompts: FastSoftPrompt | None = None,
        loss_function: LossFunction | None = None,
        **options: Any,
    ) -> Any:
        """Runs the model with each row's prompt in front of its tokens.

        Args:
            input_ids: [B, T]; the encoder's, if the model has one.
            attention_mask: [B, T] of 1 and 0; None: no padding.
            labels: [B, T] for language models and token classification, -100: no label; [B] for sequence
                classification; [B, T'], the decoder's, for encoder-decoders.
            prompt_ids: a name, a list of names (None: no prompt), or positions in ``prompts.names`` (-1: none). Not
                needed if there is one prompt.
            lengths: [B] on the host, real tokens per row; with ``num_targets`` a step never waits for a GPU.
            num_targets: number of labels of real tokens that are not -100.
            return_logits: whether decoders' language-modelling heads return logits; None: only without labels. With
                labels and False, shared execution computes logits only where the loss reads them.
            prompts: a bank for this call; None: the model's own.
            loss_function: replaces a language model's own loss. It is called with logits [M, V], their labels [M]
                (-100: none), the row of the batch [M] of each, and ``num_items_in_batch`` if that is given, as by
                Trainer; see ``tuning/objective.py``.
            options: passed on to the model.

        Returns:
            The model's output; ``logits`` [B, T, V] and hidden states [B, T, D] aligned with ``input_ids``.
        """
        for argument, reason in self.refused_arguments.items():
            value = options.pop(argument, None)
            if value is not None and value is not False:
                raise ValueError(f"`{argument}` cannot be given: {reason}")
        own_loss = {"num_items_in_batch"} if loss_function is not None else set()
        known = self._traits.parameters | own_loss
        options = {k: v for k, v in options.items() if self._traits.any_keyword or k in known}
        if return_logits is None:
            return_logits = labels is None
        bank = self.prompts if prompts is None else prompts

        def packed(runner: PackedRunner) -> Any:
            return runner.forward(
                bank,
                input_ids,
                attention_mask,
                labels,
                prompt_ids,
                lengths=lengths.tolist() if isinstance(lengths, Tensor) else lengths,
                num_targets=num_targets,
                return_logits=return_logits,
                loss_function=loss_function,
                options={k: v for k, v in options.items() if k != "use_cache"},
            )

        def padded() -> Any:
            return self._padded.forward(
                bank,
                input_ids,
                attention_mask,
                labels,
                prompt_ids,
                return_logits=return_logits,
                loss_function=loss_function,
                options=options,
            )

        if any(options.get(option) for option in PADDED_OPTIONS):
            return padded()
        return self._run(packed, padded)

    def _run(self, packed: Callable[[PackedRunner], Result], padded: Callable[[], Result]) -> Result:
        """The result of `packed`, or of `padded` where the model cannot run the packed layout."""
        if self.runner is None:
            return padded()
        reason = self.runner.unsupported
        if reason is None:
            try:
                return packed(self.runner)
            except Unsupported as error:
                reason = str(error)
        self._fallback(reason)
        return padded()

    def _fallback(self, reason: str) -> None:
        """Uses the padded layout from now on."""
        if self.runner is not None and self.runner.unsupported is None:
            self.runner.give_up(reason)

    @property
    def _padded(self) -> PaddedRunner:
        return PaddedRunner(self.base_model, self._traits)  # not kept: replicas (nn.DataParallel) have another base

    def execution_report(self) -> ExecutionReport:
        """The execution that is used, the reason, and the result of the check once it has run."""
        if self.runner is None:
            return ExecutionReport("padded", "asked for", {})
        if self.runner.unsupported is not None:
            return ExecutionReport("padded", self.runner.unsupported, self.runner.checked)
        return ExecutionReport("shared", "exact for this architecture", self.runner.checked)

    @torch.no_grad()
    def next_token_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        prompts: FastSoftPrompt | None = None,
    ) -> Tensor:
        """[B, V], a decoder's logits after each row's text; other logits are not computed."""
        return self._logits_after(input_ids, attention_mask, prompt_ids, None, prompts)

    @torch.no_grad()
    def logits_at(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor,
        *,
        prompts: FastSoftPrompt | None = None,
    ) -> Tensor:
        """[M, V], a decoder's logits after the tokens at ``places`` [M, 2] (row, column of ``input_ids``)."""
        if places.dim() != 2 or places.shape[1] != 2:
            raise ValueError(f"`places` must be [M, 2], row and column of tokens, got {list(places.shape)}")
        return self._logits_after(input_ids, attention_mask, prompt_ids, places, prompts)

    def _logits_after(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None,
        prompts: FastSoftPrompt | None,
    ) -> Tensor:
        if not self._traits.causal:
            raise TypeError(f"{type(self.base_model).__name__} is not a decoder and has no next token")
        arguments = (self.prompts if prompts is None else prompts, input_ids, attention_mask, prompt_ids, places)
        return self._run(lambda runner: runner.logits_after(*arguments), lambda: self._padded.logits_after(*arguments))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        prompts: FastSoftPrompt | None = None,
        **options: Any,
    ) -> Any:
        """``model.generate`` with each row's prompt in front: any padding, any mix of prompts.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T] of 1 and 0; None: no padding.
            prompt_ids, prompts: as in :meth:`forward`.
            options: options of transformers' ``generate``. ``max_length`` and ``min_length`` count ``input_ids`` and
                new tokens, never prompts.

        Returns:
            The result of ``generate``; for decoders ``input_ids`` followed by the new tokens, as without a prompt.
        """
        if not getattr(self.base_model, "can_generate", lambda: False)():
            raise TypeError(f"{type(self.base_model).__name__} cannot generate text")
        bank = self.prompts if prompts is None else prompts
        with torch.no_grad():
            if self._traits.encoder_decoder:
                batch = self._padded.assemble(bank, input_ids, attention_mask, prompt_ids, None, "right")
                return self.base_model.generate(**batch, **options)
            batch = self._padded.assemble(bank, input_ids, attention_mask, prompt_ids, None, "left")
            return generation.generate(self.base_model, input_ids, batch, options)

    # --- training helpers that transformers' Trainer looks for ---

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing_disable()

    # --- files ---

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
            name: None: the folder's name, with ``-`` for characters that a name cannot have.
            force: also load a prompt that was tuned on other weights than the model's.

        Raises:
            ValueError: the prompt was tuned on other weights, or for a model of another size.
        """
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
    ) -> SoftPromptModel:
        """A model with the prompts of a directory: one adapter folder, or a folder of them.

        Args:
            names: load only these.
            force: also load prompts that were tuned on other weights than the model's.
            options: options of the constructor.

        Raises:
            FileNotFoundError: there is no such prompt.
            ValueError: a prompt was tuned on other weights, or for a model of another size.
        """
        folders = prompts_by_name(directory)
        if names is not None:
            missing = set(names) - set(folders) - {folder.name for folder in folders.values()}
            if missing:
                raise FileNotFoundError(f"{directory} has no prompt named {', '.join(sorted(missing))}")
            folders = {name: folder for name, folder in folders.items() if {name, folder.name} & set(names)}
        tuned = cls(model, **options)
        for name, folder in folders.items():
            tuned.load_prompt(folder, name, force=force)
        return tuned
