"""``SoftPromptModel``: a frozen transformers model with a bank of soft prompts in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hf import architecture, generation
from ..ops.assemble.batch import PromptedBatch
from ..packed.runner import ExecutionReport, PackedRunner
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..prompts.peft_files import UPDATED, peft_type, prompt_folders, read_prompt, read_updated_prompt, write_prompt
from ..tasks.encoding import IGNORED

# Of a model's output, what has one entry per input position, and what is a tuple of such.
ALIGNED = ("logits", "last_hidden_state", "encoder_last_hidden_state")
ALIGNED_TUPLES = ("hidden_states", "encoder_hidden_states")
LossFunction = Callable[..., Tensor]
EXECUTIONS = ("auto", "shared", "padded")
OWN_ARGUMENTS = {
    "inputs_embeds": "the prompt is put in front of the embeddings of `input_ids` here",
    "position_ids": "positions follow from the attention mask and the prompts' lengths",
    "past_key_values": "forward runs whole rows; `generate` handles the cache",
}


class SoftPromptModel(nn.Module):
    """Freezes a model and holds its soft prompts.

    ``forward`` returns what the model returns, with logits and hidden states aligned with ``input_ids``: position
    ``t`` of the output belongs to token ``t`` of the input, prompts are dropped, padding is zero. A row's numbers do
    not depend on the other rows of its batch or on where its padding stands.

    Args:
        model: a transformers decoder, encoder or encoder-decoder; its parameters are frozen in place.
        prompts: a bank to use; None: an empty one, on the model's device.
        execution: "shared": each distinct prompt runs once per batch, padding never runs, logits only where they are
            read (``shared_prompt.py``). "padded": every row carries its prompt, for any architecture. "auto": shared
            where that is exact, else padded, with one log line that says why; :meth:`execution_report` tells too.
        check: compare the first training and the first inference batch of "shared" with each row run alone.
        shared_text: "auto": tokens that all rows of a prompt share at their start (an instruction, examples) run once
            too; None: they do not.

    Raises:
        TypeError: a model that a prompt in front of its input cannot be right for, with the reason.
    """

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
        self._parameters_of_forward = architecture.forward_parameters(model)
        self._any_keyword = architecture.accepts_any_keyword(model)
        self.accepts_loss_kwargs = self._any_keyword  # Trainer asks before it passes num_items_in_batch
        self.execution = execution
        self.shared = self._shared_prompt(model, check, shared_text) if execution != "padded" else None
        if execution == "shared" and self.shared is not None and self.shared.unsupported:
            raise ValueError(f"execution='shared' is not exact for this model: {self.shared.unsupported}")
        self._next_token_model = architecture.is_causal(model) and not architecture.pools_last_token(model)
        self._padding_side = "left" if architecture.pools_last_token(model) else "right"

    @staticmethod
    def _prompt_width(model: Any) -> int:
        """Numbers of one virtual token."""
        width: int = model.get_input_embeddings().weight.shape[1]
        return width

    @staticmethod
    def _shared_prompt(model: Any, check: bool, shared_text: str | None) -> PackedRunner:
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
        tokenizer: Any = None,
        init_text: str | None = None,
        class_labels: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> nn.Parameter:
        """Adds a prompt and returns its parameter [P, D]; arguments as in :meth:`FastSoftPrompt.add_prompt`."""
        return self.prompts.add_prompt(
            name,
            num_virtual_tokens,
            init=init,
            embedding=self.get_input_embeddings(),
            tokenizer=tokenizer,
            init_text=init_text,
            class_labels=class_labels,
            seed=seed,
        )

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
            input_ids: [B, T]; of the encoder, if the model has one.
            attention_mask: [B, T] of 1 and 0; None: no padding.
            labels: [B, T] for language models and token classification, -100 where there is none; [B] for sequence
                classification; [B, T'] of the decoder for encoder-decoders.
            prompt_ids: a name, a list of names (None: no prompt), or positions in ``prompts.names`` (-1: none). May
                be left out if there is one prompt.
            lengths: [B] on the host, real tokens per row; with ``num_targets`` a step never waits for a GPU.
            num_targets: labels of real tokens that are not -100.
            return_logits: of decoders' language-modelling heads; None: only without labels. With labels, shared
                execution computes logits only where the loss reads them, unless all are asked for.
            prompts: a bank for this call; None: the model's own.
            loss_function: instead of a language model's own loss: called with the logits [M, V] where labels are
                expected, the labels [M] (-100: none), the row of the batch [M] that each belongs to, and, as Trainer
                passes it, ``num_items_in_batch``; see ``tuning/objective.py``.
            options: passed on to the model.

        Returns:
            The model's output; ``logits`` [B, T, V] and hidden states [B, T, D] aligned with ``input_ids``.
        """
        for argument, reason in OWN_ARGUMENTS.items():
            if options.pop(argument, None) is not None:
                raise ValueError(f"`{argument}` must not be given: {reason}")
        own_loss = {"num_items_in_batch"} if loss_function is not None else set()
        known = self._parameters_of_forward | own_loss
        options = {k: v for k, v in options.items() if self._any_keyword or k in known}
        if return_logits is None:
            return_logits = labels is None
        bank = self.prompts if prompts is None else prompts
        if self._shares(options):
            assert self.shared is not None
            output = self.shared.forward(
                bank,
                input_ids,
                attention_mask,
                labels,
                prompt_ids,
                lengths=lengths.tolist() if isinstance(lengths, Tensor) else lengths,
                num_targets=num_targets,
                return_logits=return_logits,
                loss_function=loss_function,
                options=options,
            )
            if output is not None:
                return output
        return self._forward_padded(
            bank, input_ids, attention_mask, labels, prompt_ids, return_logits, options, loss_function
        )

    def _forward_padded(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        prompt_ids: PromptIds,
        return_logits: bool,
        options: dict[str, Any],
        loss_function: LossFunction | None = None,
    ) -> Any:
        per_token = labels is not None and labels.shape == input_ids.shape and not self._labels_stand_apart()
        per_slot = labels if per_token else None
        batch = self._assemble(bank, input_ids, attention_mask, prompt_ids, per_slot, self._padding_side)
        inputs = dict(batch)
        if labels is not None and not per_token:
            inputs["labels"] = labels
        if "use_cache" in self._parameters_of_forward:
            options = {"use_cache": False} | options
        if loss_function is not None and labels is not None:
            items = {key: options.pop(key) for key in ("num_items_in_batch",) if key in options}
            output, loss = self._with_own_loss(inputs, per_token, loss_function, items, options)
            output["loss"] = loss
        else:
            output = self.base_model(**inputs, **options)
        if not return_logits and self._next_token_model and getattr(output, "logits", None) is not None:
            output["logits"] = None
        return self._align(output, batch)

    def _with_own_loss(
        self,
        inputs: dict[str, Any],
        per_token: bool,
        loss_function: LossFunction,
        items: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """A decoder's or encoder-decoder's output, and the caller's loss of it."""
        if not (per_token and self._next_token_model) and not architecture.is_encoder_decoder(self.base_model):
            raise ValueError("`loss_function` must not be given: this model's labels are not tokens of a text")
        labels = inputs["labels"]
        if per_token:  # else labels become the decoder's input
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        output = self.base_model(**inputs, **options)
        logits = output.logits
        if per_token:
            logits, labels = logits[:, :-1], labels[:, 1:]
        row, column = (labels != IGNORED).nonzero(as_tuple=True)
        return output, loss_function(logits[row, column], labels[row, column], row, **items)

    def execution_report(self) -> ExecutionReport:
        """Which execution is used, and why; what the comparison with the padded layout gave, once it was made."""
        if self.shared is None:
            return ExecutionReport("padded", "asked for", {})
        if self.shared.unsupported is not None:
            return ExecutionReport("padded", self.shared.unsupported, self.shared.checked)
        return ExecutionReport("shared", "exact for this architecture", self.shared.checked)

    def _shares(self, options: dict[str, Any]) -> bool:
        """Whether a call can take the shared path; what only the padded one gives is not a reason to give it up."""
        return (
            self.shared is not None
            and self.shared.unsupported is None
            and not options.get("output_attentions")
            and not options.get("use_cache")
        )

    @torch.no_grad()
    def next_token_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        prompts: FastSoftPrompt | None = None,
    ) -> Tensor:
        """[B, V], what a decoder expects behind each row's text; computed nowhere else."""
        return self._logits_behind(input_ids, attention_mask, prompt_ids, None, prompts)

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
        """[M, V], what a decoder expects behind the tokens at ``places`` [M, 2] (row, column of ``input_ids``)."""
        if places.dim() != 2 or places.shape[1] != 2:
            raise ValueError(f"`places` must be [M, 2], row and column of tokens, got {list(places.shape)}")
        return self._logits_behind(input_ids, attention_mask, prompt_ids, places, prompts)

    def _logits_behind(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None,
        prompts: FastSoftPrompt | None,
    ) -> Tensor:
        if not architecture.is_causal(self.base_model):
            raise TypeError(f"{type(self.base_model).__name__} is not a decoder and has no next token")
        bank = self.prompts if prompts is None else prompts
        if self._shares({}):
            assert self.shared is not None
            logits = self.shared.logits_behind(bank, input_ids, attention_mask, prompt_ids, places)
            if logits is not None:
                return logits
        if places is None:
            return self._padded_next_token_logits(bank, input_ids, attention_mask, prompt_ids)
        every: Tensor = self._forward_padded(bank, input_ids, attention_mask, None, prompt_ids, True, {}).logits
        return every[places[:, 0], places[:, 1]]

    def _padded_next_token_logits(
        self, bank: FastSoftPrompt, input_ids: Tensor, attention_mask: Tensor | None, prompt_ids: PromptIds
    ) -> Tensor:
        batch = self._assemble(bank, input_ids, attention_mask, prompt_ids, None, "left")
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters_of_forward else {}
        if "use_cache" in self._parameters_of_forward:
            options["use_cache"] = False
        logits: Tensor = self.base_model(**batch, **options).logits
        return logits[:, -1]

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
            options: of transformers' ``generate``. ``max_length`` and ``min_length`` count ``input_ids`` and new
                tokens, never prompts.

        Returns:
            What ``generate`` returns. Decoders: ``input_ids`` followed by the new tokens, as without a prompt.
        """
        if not getattr(self.base_model, "can_generate", lambda: False)():
            raise TypeError(f"{type(self.base_model).__name__} cannot generate text")
        bank = self.prompts if prompts is None else prompts
        with torch.no_grad():
            if architecture.is_encoder_decoder(self.base_model):
                batch = self._assemble(bank, input_ids, attention_mask, prompt_ids, None, "right")
                return self.base_model.generate(**batch, **options)
            batch = self._assemble(bank, input_ids, attention_mask, prompt_ids, None, "left")
            return generation.generate(self.base_model, input_ids, batch, options)

    def _assemble(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        labels: Tensor | None,
        padding_side: str,
    ) -> PromptedBatch:
        batch: PromptedBatch = bank(
            input_ids,
            attention_mask,
            embedding=self.get_input_embeddings(),
            prompt_ids=prompt_ids,
            labels=labels,
            padding_side=padding_side,
        )
        return batch

    def _labels_stand_apart(self) -> bool:
        """Labels that are not one per input token."""
        return architecture.is_encoder_decoder(self.base_model) or architecture.pools_last_token(self.base_model)

    def _align(self, output: Any, batch: PromptedBatch) -> Any:
        aligned = set(ALIGNED)
        if self._labels_stand_apart():
            aligned.discard("logits")
        tuples = set(ALIGNED_TUPLES)
        if architecture.is_encoder_decoder(self.base_model):
            aligned.discard("last_hidden_state")
            tuples.discard("hidden_states")
        for name in aligned:
            if getattr(output, name, None) is not None:
                output[name] = batch.unpack(output[name])
        for name in tuples:
            if getattr(output, name, None) is not None:
                output[name] = tuple(batch.unpack(states) for states in output[name])
        return output

    # --- training helpers that transformers' Trainer looks for ---

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing_disable()

    # --- files ---

    def save_pretrained(self, directory: PathLike[str] | str, names: Sequence[str] | None = None) -> None:
        """Writes each prompt as a PEFT adapter folder, ``directory/<name>/``. The base model is not written.

        PEFT refuses a prompt that has a token update, for it knows none.
        """
        facts = architecture.peft_config(self.base_model)
        for name in self.prompts.names if names is None else names:
            write_prompt(Path(directory) / name, self.prompts.values(name), facts, self.prompts.token_update(name))

    def load_prompt(self, folder: PathLike[str] | str, name: str | None = None) -> nn.Parameter:
        """Adds the prompt of an adapter folder, ours or PEFT's, with its token update, ready to be trained further.

        Args:
            name: None: the folder's name.
        """
        name = name or Path(folder).resolve().name
        if peft_type(folder) != UPDATED:
            return self.prompts.add_prompt(name, init=self.read_prompt(folder))
        values, factors, config = read_updated_prompt(folder)
        parameter = self.prompts.add_prompt(name, init=self._fitting(folder, values, config))
        self.prompts.set_token_update(name, *factors)
        return parameter

    def read_prompt(self, folder: PathLike[str] | str) -> Tensor:
        """[P, D] float32, the prompt of an adapter folder.

        Raises:
            ValueError: it was made for a model of another size, or has a token update.
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
        cls, model: Any, directory: PathLike[str] | str, names: Sequence[str] | None = None, **options: Any
    ) -> SoftPromptModel:
        """A model with the prompts of a directory: one adapter folder, or a folder of them.

        Args:
            names: load only these.
            options: of the constructor.

        Raises:
            FileNotFoundError: no prompt there.
        """
        folders = prompt_folders(directory)
        if names is not None:
            missing = set(names) - {folder.name for folder in folders}
            if missing:
                raise FileNotFoundError(f"{directory} has no prompt named {', '.join(sorted(missing))}")
            folders = [folder for folder in folders if folder.name in names]
        tuned = cls(model, **options)
        for folder in folders:
            tuned.load_prompt(folder)
        return tuned
