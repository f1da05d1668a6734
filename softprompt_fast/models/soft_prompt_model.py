"""``SoftPromptModel``: a frozen transformers model with a bank of soft prompts in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..base.errors import PackedFailure, Unsupported
from ..hf import architecture, generation_options
from ..hf.embedding import vectors_like
from ..hf.input_check import check_inputs
from ..packed.runner import ExecutionReport, PackedRunner
from ..packed.self_check import CHECKED_ROWS
from ..packed.task_heads import TaskHeadRunner
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from . import fused_head
from .call import Texts, check_labels, kept_columns, known_options, report_first_labels, texts_of
from .padded_runner import LossFunction, PaddedRunner
from .prompt_files import PromptFiles
from .text_generator import TextGenerator

if TYPE_CHECKING:
    pass

Result = TypeVar("Result")
EXECUTIONS = ("auto", "shared", "padded")


class SoftPromptModel(PromptFiles):
    """Freezes a model and holds its soft prompts.

    ``forward`` returns what the model returns, with logits and hidden states aligned with ``input_ids``: position
    ``t`` of the output belongs to token ``t`` of the input, prompts are dropped, padding is zero. A row's numbers do
    not depend on the other rows of its batch or on where its padding is.

    Args:
        model: a transformers decoder, encoder or encoder-decoder, or a PEFT model of one. Its parameters are frozen
            in place until :meth:`unload`, or until the last object that uses it is gone. What ``torch.compile(model)``
            returned is taken as the model itself after ``model.compile()``.
        prompts: a bank to use; None: an empty one, on the model's device.
        train_adapters: whether adapters in a PEFT model (LoRA and others) stay trainable, so that they are trained
            together with prompts, or alone if prompts are frozen. False: they are frozen like the rest, unless another
            object that uses the model trains them.
        execution: one of:

            * "shared": each distinct prompt runs once per batch, padding never runs, and logits are computed only
              where they are read (``packed/runner.py``).
            * "padded": every row carries its prompt; for any architecture (``models/padded_runner.py``).
            * "auto": "shared" where that is exact, else "padded". One log line and :meth:`execution_report` say why.
        check: compare the first training and the first inference batch of "shared" with each row run alone.
        shared_text: "auto": tokens that all rows of a prompt share at their start (an instruction, examples) also run
            once; None: they run in every row.
        cuda_graphs: on a GPU, "shared" runs batches whose sizes come again as CUDA graphs (``packed/cuda_graphs.py``).
            They keep the memory of one step of the largest batch. A loss that is kept and has no backward pass keeps
            later batches from running so.
        train_head: whether the model's head (``head_modules``) is trained with the prompts, for heads other than those
            of language models. It then belongs to ``parameters()`` that need a gradient, to ``state_dict`` and to saved
            prompts. None: if no checkpoint held its weights, so that they are random. If that is not known, it is
            frozen, and one log line says so.

    Raises:
        TypeError: the model's results would be wrong with a prompt in front of its input; with the reason.
    """

    refused_arguments: ClassVar[dict[str, str]] = {
        "position_ids": "positions follow from the attention mask and the prompts' lengths. If a trainer packs several "
        "texts into one row, turn this off (`packing`, `padding_free`): padding never runs here",
        "past_key_values": "forward runs whole rows; `generate` handles the cache",
        "cache": "forward runs whole rows; `generate` handles the cache",
        "encoder_outputs": "the encoder runs with the prompts",
        "adapter_names": "all rows of a batch run with the active adapter; `set_adapter` chooses it",
    }
    """Arguments of the model's forward that cannot be given here, and why."""
    predicts_first_token: ClassVar[bool] = True
    """Whether a decoder's loss reads labels on the first token of a row, which the prompt's last vector predicts."""

    def __init__(
        self,
        model: Any,
        prompts: FastSoftPrompt | None = None,
        *,
        train_adapters: bool = False,
        execution: str = "auto",
        check: bool = True,
        shared_text: str | None = "auto",
        cuda_graphs: bool = True,
        train_head: bool | None = None,
    ) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"`execution` must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if shared_text not in ("auto", None):
            raise ValueError(f"`shared_text` must be 'auto' or None, got {shared_text!r}")
        super().__init__(model, train_head=train_head, train_adapters=train_adapters)
        model = self.base_model
        check_inputs(model, run_sharded=False)
        width = self._prompt_width(model)
        if prompts is not None and prompts.embedding_dim != width:
            raise ValueError(f"`prompts` must have embedding_dim={width} like the model, got {prompts.embedding_dim}")
        self.prompts = prompts if prompts is not None else FastSoftPrompt(width, device=self.device)
        self._traits = architecture.ForwardTraits.of(model)
        # Trainer asks before it passes num_items_in_batch, which transformers' other heads accept and do not read.
        self.accepts_loss_kwargs = self._traits.any_keyword and not self._traits.has_task_head
        self.execution = execution
        self._reported: set[str] = set()
        self._packed_worked = False
        options = {"check": check, "shared_text": shared_text, "cuda_graphs": cuda_graphs}
        self.runner = self._packed_runner(model, **options) if execution != "padded" else None
        """Runs the packed layout; None: padded execution was asked for."""
        self._generator = TextGenerator(model, None if self._traits.has_task_head else self.runner)
        if execution == "shared" and self.runner is not None and self.runner.unsupported:
            raise ValueError(f"execution='shared' is not exact for this model: {self.runner.unsupported}")

    @staticmethod
    def _prompt_width(model: Any) -> int:
        """Numbers of one virtual token."""
        return vectors_like(model.get_input_embeddings()).shape[1]

    @staticmethod
    def _packed_runner(model: Any, **options: Any) -> PackedRunner:
        runner = TaskHeadRunner if architecture.ForwardTraits.of(model).has_task_head else PackedRunner
        return runner(model, **options)

    # --- prompts ---

    def remove_prompt(self, name: str) -> None:
        self.prompts.remove_prompt(name)

    def unload(self) -> Any:
        """Returns the base model as it was: its attention and its trainable parameters, unless others still use it.

        Afterwards this object only keeps its prompts, which can be saved. Running it raises RuntimeError.
        """
        if self.runner is not None:
            self.runner.stop("the model was unloaded")
        self._generator.close()
        return super().unload()

    # --- running ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_targets: int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        prompts: FastSoftPrompt | None = None,
        loss_function: LossFunction | None = None,
        prompt_columns: int = 0,
        **options: Any,
    ) -> Any:
        """Runs the model with each row's prompt in front of its tokens.

        Args:
            input_ids: [B, T]; the encoder's, if the model has one.
            attention_mask: [B, T] of 1 and 0; None: no padding.
            labels: [B, T] for language models and token classification, -100: no label; [B], or [B, C] of several
                labels, for sequence classification; [B, T'], the decoder's, for encoder-decoders.
            prompt_ids: a name, a list of names (None: no prompt), or positions in ``prompts.names`` (-1: none). A tuple
                in the list: these prompts, one after the other. Not needed if there is one prompt.
            inputs_embeds: [B, T, D], the tokens' vectors instead of their ids; they get a gradient if they need one.
            start_positions, end_positions: [B] for question answering, columns of ``input_ids`` in which the answers
                begin and end; a column that is padding or not one of ``input_ids`` is ignored.
            lengths: [B] on the host, real tokens per row; with ``num_targets`` a step never waits for a GPU.
            num_targets: number of labels of real tokens that are not -100.
            return_logits: whether decoders' language-modelling heads return logits; None: without labels, or outside
                training. With labels and False, shared execution computes logits only where the loss reads them.
            logits_to_keep: return logits of the last so many columns of ``input_ids``, or of these columns; 0: of all.
            return_dict: False: a tuple, as transformers' models return it; None: as the configuration says.
            prompts: a bank for this call; None: the model's own.
            loss_function: replaces a language model's own loss. It is called with logits [M, V], their labels [M]
                (-100: none), the row of the batch [M] of each, and ``num_items_in_batch`` if that is given, as by
                Trainer; see ``tuning/objective.py``.
            prompt_columns: P, if every row has a prompt of this length: logits [B, P + T, V] and hidden states begin
                with the prompt's columns, as PEFT returns them. Numbers are only sure in the column before a row's
                first token, which belongs to the prompt's last vector; others of prompts may be zero.
            options: passed on to the model. ``token_type_ids`` [B, T] are widened by the prompt, of type 0. Keys that
                tokenizers return and the model does not take are dropped; other unknown keys too, with one log line.
                With ``fused_lm_head=True``, which TRL's trainers give, the result is TRL's: log-probabilities of the
                labels, each at its label's column, in place of logits.

        Returns:
            The model's output; ``logits`` [B, T, V] and hidden states [B, T, D] aligned with ``input_ids``. Sequence
            classification has ``logits`` [B, C]; question answering ``start_logits`` and ``end_logits`` [B, T], with
            the smallest number at padding. ``pooler_output`` [B, D] of an encoder without a head reads its first
            position, which is the prompt's first vector; for sentences see :func:`pooled_text`.
            ``attentions`` [B, H, S, S] and ``past_key_values`` are not aligned: their S slots of a row are its prompt,
            its text and padding.

        Raises:
            TypeError, ValueError, IndexError: naming the argument, the rule, and the value it got.
            RuntimeError: after :meth:`unload`.
        """
        self._check_loaded()
        if options.pop(fused_head.ARGUMENT, False):
            rows: dict[str, Any] = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
            }
            return fused_head.answer(self, labels, **rows, prompt_ids=prompt_ids, prompts=prompts, **options)
        for argument, reason in self.refused_arguments.items():
            value = options.pop(argument, None)
            if value is not None and value is not False:
                raise ValueError(f"`{argument}` cannot be given: {reason}")
        ends = {"start_positions": start_positions, "end_positions": end_positions}
        options |= {name: value for name, value in ends.items() if value is not None}
        own = frozenset({"num_items_in_batch"} if loss_function is not None else ())
        options = known_options(options, self._traits, self._reported, own)
        texts = self._texts(input_ids, attention_mask, inputs_embeds, options.get("token_type_ids"))
        if labels is None and self.predicts_first_token and self._traits.predicts_next_token:
            report_first_labels(options, self._reported)
        columns = kept_columns(logits_to_keep, prompt_columns + texts.input_ids.shape[1])
        check_labels(labels, texts.input_ids.shape, self._traits, options)
        arguments = (self.prompts if prompts is None else prompts, texts.input_ids, attention_mask, labels, prompt_ids)
        settings: dict[str, Any] = {
            "return_logits": labels is None or not self.training if return_logits is None else return_logits,
            "loss_function": loss_function,
            "embedding": texts.embedding,
            "prompt_columns": prompt_columns,
        }

        def packed(runner: PackedRunner) -> Any:
            return runner.forward(
                *arguments,
                lengths=lengths.tolist() if isinstance(lengths, Tensor) else lengths,
                num_targets=num_targets,
                options={k: v for k, v in options.items() if k in runner.options or k == "output_attentions"},
                **settings,
            )

        def padded() -> Any:
            return self._padded.forward(*arguments, options=options, **settings)

        if getattr(self.config, "output_attentions", False):
            options.setdefault("output_attentions", True)
        packed_options = PackedRunner.options if self.runner is None else self.runner.options
        unpacked = [k for k, v in options.items() if k not in packed_options and v is not False]
        output = self._run_padded_for(unpacked[0], padded) if unpacked else self._run(packed, padded)
        if self.training and torch.is_grad_enabled() and output.get("loss") is not None:
            self._check_gradient(output["loss"], arguments[0], prompt_ids, len(texts.input_ids))
        if output.get("logits") is not None and self._traits.labels_per_token:
            output["logits"] = output["logits"][:, columns]
        # Without fields that are None and in the order of its class: `output[0]` is the loss if there is one.
        filled = {f.name: output[f.name] for f in fields(output) if output.get(f.name) is not None}
        output = type(output)(**filled)
        as_mapping = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_mapping else output.to_tuple()

    def _check_gradient(self, loss: Tensor, bank: FastSoftPrompt, prompt_ids: PromptIds, rows: int) -> None:
        """Refuses to train with layers that only infer: without a gradient nothing would be learnt."""
        if not loss.requires_grad and any(prompt.requires_grad for prompt in bank.select(prompt_ids, rows).prompts):
            kind = type(self.base_model).__name__
            raise TypeError(f"{kind} cannot train prompts: its layers pass no gradient on, as in some 8-bit formats")

    def _texts(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Texts:
        return texts_of(self.base_model, input_ids, attention_mask, inputs_embeds, token_types)

    def _run(self, packed: Callable[[PackedRunner], Result], padded: Callable[[], Result]) -> Result:
        """The result of `packed`, or of `padded` where the model cannot run the packed layout."""
        check_inputs(self.base_model)
        if self.runner is None:
            return padded()
        reason = self.runner.unsupported
        if reason is None:
            try:
                result = packed(self.runner)
            except Unsupported as error:
                reason = str(error)
            except PackedFailure as failure:
                cause = failure.__cause__
                if self._packed_worked or not isinstance(cause, Exception):
                    raise (cause or failure) from None
                return self._after_error(cause, padded)
            else:
                self._packed_worked = True
                return result
        self._fallback(reason)
        return padded()

    def _after_error(self, error: Exception, padded: Callable[[], Result]) -> Result:
        """Runs the padded layout after the first packed batch failed: if this fails too, the call is at fault."""
        try:
            result = padded()
        except Exception:
            raise error from None
        self._fallback(f"the packed layout failed: {type(error).__name__}: {error}")
        return result

    def _run_padded_for(self, option: str, padded: Callable[[], Result]) -> Result:
        """The result of `padded`, for an option of the model's forward that the packed layout does not have."""
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
        self._check_loaded()
        if not self._traits.predicts_next_token:
            raise TypeError(f"{type(self.base_model).__name__} does not predict the next token")
        texts = self._texts(input_ids, attention_mask)
        bank = self.prompts if prompts is None else prompts
        arguments = (bank, texts.input_ids, attention_mask, prompt_ids, places, texts.embedding)
        return self._run(lambda runner: runner.logits_after(*arguments), lambda: self._padded.logits_after(*arguments))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_ids: PromptIds = None,
        *,
        inputs: Tensor | None = None,
        prompts: FastSoftPrompt | None = None,
        **options: Any,
    ) -> Any:
        """``model.generate`` with each row's prompt in front: any padding, any mix of prompts.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T] of 1 and 0; None: no padding.
            inputs: another name of ``input_ids``.
            prompt_ids, prompts: as in :meth:`forward`.
            options: options of transformers' ``generate``. Lengths, penalties and stopping count and read
                ``input_ids`` and new tokens, never prompts or padding. ``token_type_ids`` [B, T] are read if the
                model has such types; other keys of tokenizers have no effect.

        Returns:
            The result of ``generate``; for decoders ``input_ids`` followed by the new tokens, as without a prompt.
            Hidden states, attentions and the cache of ``return_dict_in_generate`` are the model's own: they may
            contain places of prompts and padding.

        Raises:
            TypeError: the model does not generate text, or an argument of another type.
            ValueError: an option that cannot be combined with prompts, by name.
        """
        self._check_loaded()
        if not self.can_generate():
            raise TypeError(f"{type(self.base_model).__name__} cannot generate text")
        ids, mask = generation_options.checked_rows(self.base_model, input_ids, inputs, attention_mask)
        bank = self.prompts if prompts is None else prompts
        check_inputs(self.base_model)
        selection = bank.select(prompt_ids, len(ids))
        virtual, tokens = [count for _, count in selection.prefixes], (mask != 0).sum(1).tolist()
        generation_options.check_begins(virtual, tokens)
        if not len(ids):
            return ids[:, :1] if self._traits.encoder_decoder else ids
        if self._traits.encoder_decoder:
            options = generation_options.encoder_decoder_options(self.base_model, options)
            batch = self._padded.assemble(bank, ids, attention_mask, prompt_ids, None, "right")
            return self.base_model.generate(**batch, **options)
        architecture.check_room(virtual, tokens, self._traits.context_length)
        if self._generator.can_compile(selection, mask, options):
            self._check_first(bank, ids, mask, prompt_ids)
        return self._generator.generate(self._padded, bank, selection, ids, mask, prompt_ids, options)

    def _check_first(self, bank: FastSoftPrompt, input_ids: Tensor, mask: Tensor, prompt_ids: PromptIds) -> None:
        """Compares the first batch with each row run alone, as :meth:`forward` does it."""
        if self.runner is not None and self.runner.check and "inference" not in self.runner.checked:
            names = prompt_ids if prompt_ids is None or isinstance(prompt_ids, str) else prompt_ids[:CHECKED_ROWS]
            self.next_token_logits(input_ids[:CHECKED_ROWS], mask[:CHECKED_ROWS], names, prompts=bank)
