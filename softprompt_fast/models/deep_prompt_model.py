"""Deep prompts: the keys and values of every layer for P virtual tokens are trained, not vectors at the input.

Prefix tuning (Li & Liang 2021, arXiv 2101.00190) and P-tuning v2 (arXiv 2110.07602). A deep prompt has the form of a
compiled plain prompt, so it does not run through the model: packed texts follow the trained keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..base.errors import Unsupported
from ..base.locations import located
from ..base.modules import evaluating
from ..compiled.compile import compile_prompts, flattened, slot_shape
from ..compiled.prefix_runner import PrefixRunner
from ..hf import architecture, generation_options
from ..hf.architecture import check_architecture
from ..hf.embedding import embedding_table, vectors_like
from ..packed.runner import ExecutionReport, PackedRunner
from ..prompts.base_identity import base_facts
from ..prompts.card import update_card
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..prompts.initialization import INITIALIZATIONS, initial_prompt
from ..prompts.peft_files import DEEP, DEEP_TYPES, is_deep, is_prompt_folder, read_prefix, write_prefix
from ..prompts.placement import check_frozen, freeze_first, frozen_count
from ..prompts.vector_files import read_vectors
from .prompt_files import checked_type
from .soft_prompt_model import SoftPromptModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..prompts.initialization import InitOptions


class DeepPromptModel(SoftPromptModel):
    """Freezes a decoder and holds deep prompts: ``prompts[name]`` is [P, W], with W = L * 2 * H' * E.

    A row's text follows its ``prompts[name]``, cached keys and values of every layer in PEFT's order. Used like
    :class:`SoftPromptModel`: any mix of prompts in a batch, outputs aligned with ``input_ids``. A prompt has no output
    of its own, so nothing predicts a row's first token, and a label on it is not read.

    Args:
        model: a causal language model that can run the packed layout.
        prompts: a bank of embedding_dim W to use; None: an empty one, on the model's device.
        train_adapters: as for :class:`SoftPromptModel`.
        check: compare the first training and the first inference batch with each row run alone.
        cuda_graphs: on a GPU, generate text by CUDA graphs (``compiled/decode_graph.py``).

    Raises:
        TypeError: the model cannot run the packed layout; with the reason. If only running shows it, the first batch
            raises it.
    """

    predicts_first_token = False
    runner: PrefixRunner
    prompts: FastSoftPrompt

    def __init__(
        self,
        model: Any,
        prompts: FastSoftPrompt | None = None,
        *,
        train_adapters: bool = False,
        check: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        model = architecture.compiled_in_place(model)
        architecture.check_supported(model)
        try:
            check_architecture(model)
            slot_shape(model)
        except Unsupported as error:
            raise _refusal(model, str(error)) from error
        options: dict[str, Any] = {"train_adapters": train_adapters, "check": check, "cuda_graphs": cuda_graphs}
        super().__init__(model, prompts, shared_text=None, **options)
        if self.runner.unsupported is not None:
            self._fallback(self.runner.unsupported)

    @property
    def loss_type(self) -> str | None:
        """Trainer counts the targets of a "ForCausalLM" loss without each row's first token, as this loss does."""
        return getattr(self.base_model, "loss_type", None)

    @staticmethod
    def _prompt_width(model: Any) -> int:
        return torch.Size(slot_shape(model)).numel()

    @staticmethod
    def _packed_runner(model: Any, **options: Any) -> PackedRunner:
        return PrefixRunner(model, check=options["check"], cuda_graphs=options["cuda_graphs"])

    def _after_error(self, error: Exception, padded: Callable[[], Any]) -> NoReturn:
        """Tells a bad call from a model that cannot run packed texts, by a batch that is known to be good."""
        ids = torch.ones(2, 2, dtype=torch.int64, device=self.device)
        bank = FastSoftPrompt(self.prompts.embedding_dim, {"any": 1}, device=self.device)
        try:
            self.runner.logits_after(bank, ids, None, None)
        except Exception as failure:
            cause = failure.__cause__ or failure
            self._fallback(f"the packed layout failed: {type(cause).__name__}: {cause}")
        raise error

    def _run_padded_for(self, option: str, padded: Callable[[], Any]) -> NoReturn:
        reason = "deep prompts run in the packed layout, which does not support it"
        raise ValueError(f"`{option}` cannot be given: {reason}")

    def _fallback(self, reason: str) -> NoReturn:
        """Refuses the call: there is no other layout."""
        self.runner.stop(reason)
        raise _refusal(self.base_model, reason)

    def add_prompt(
        self,
        name: str,
        num_virtual_tokens: int | None = None,
        *,
        init: str | Tensor | PathLike[str] = "random",
        num_frozen_tokens: int = 0,
        **options: Unpack[InitOptions],
    ) -> nn.Parameter:
        """Adds a prompt and returns its parameter [P, W].

        Args:
            init: one of:

                * a plain prompt, whose keys and values are computed: "random", "vocabulary", "text", "class_labels", a
                  tensor [P, D] or the folder of a tuned prompt, as in :meth:`FastSoftPrompt.add_prompt`.
                * a deep prompt to copy: a tensor [P, W], PEFT's folder of a prefix or a cartridge, a file, or a name in
                  this bank.
            num_frozen_tokens: this many of the first positions keep their initial values: their gradient is zero, and
                weight decay does not move them. One is enough to keep an attention sink.
            name, num_virtual_tokens, options: as in :meth:`FastSoftPrompt.add_prompt`.
        """
        source: str | Tensor | PathLike[str] = init
        if isinstance(init, str) and init not in INITIALIZATIONS and init in self.prompts:
            source = self.prompts[init].detach()
        elif not isinstance(init, Tensor) and init not in INITIALIZATIONS:
            init = located(init)
            deep = is_prompt_folder(init) and is_deep(init)
            source = self.read_prompt(init) if deep else read_vectors(init)
        values = initial_prompt(
            source,
            num_virtual_tokens,
            embedding_table(self.get_input_embeddings()),
            **options,
        )
        width = vectors_like(self.get_input_embeddings()).shape[1]
        if values.shape[1] not in (width, self.prompts.embedding_dim):
            shapes = f"[P, {width}] (a plain prompt) or [P, {self.prompts.embedding_dim}], got {list(values.shape)}"
            raise ValueError(f"prompt {name!r} must have shape {shapes}")
        if values.shape[1] != self.prompts.embedding_dim:
            try:
                with evaluating(self.base_model):
                    values = flattened(compile_prompts(self.runner, [values])).float()
            except Unsupported as error:
                self._fallback(str(error))
        check_frozen(num_frozen_tokens, len(values))
        self.prompts.add_prompt(name, init=values)
        return freeze_first(self.prompts, name, num_frozen_tokens)

    def execution_report(self) -> ExecutionReport:
        """ "shared", or "refused" with the reason; and the result of the check once it has run."""
        report = super().execution_report()
        return report if report.execution == "shared" else replace(report, execution="refused")

    def _logits_after(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None,
        prompts: FastSoftPrompt | None,
    ) -> Tensor:
        if places is None:
            _check_no_empty_row(input_ids, attention_mask)
        return super()._logits_after(input_ids, attention_mask, prompt_ids, places, prompts)

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
        """``model.generate`` after each row's prompt; arguments and result as in :meth:`SoftPromptModel.generate`."""
        self._check_loaded()
        ids, mask = generation_options.checked_rows(self.base_model, input_ids, inputs, attention_mask)
        bank = self.prompts if prompts is None else prompts
        _check_no_empty_row(ids, mask)
        selection = bank.select(prompt_ids, len(ids))
        virtual = [count for _, count in selection.prefixes]
        architecture.check_room(virtual, (mask != 0).sum(1).tolist(), self._traits.context_length)
        self._check_first(bank, ids, mask, prompt_ids)
        compiled = self.runner.compiled(selection)
        if compiled is None:
            layers, two, heads, size = self.runner.shape
            compiled = vectors_like(self.get_input_embeddings()).new_empty(layers, two, 0, heads, size)
        assert self._generator.continuation is not None
        try:
            return self._generator.continuation.generate(compiled, selection.prefixes, ids, mask, options)
        except Unsupported as error:
            self._fallback(str(error))

    # --- files ---

    def save_pretrained(
        self, directory: PathLike[str] | str, names: Sequence[str] | None = None, *, peft_type: str | None = None
    ) -> None:
        """Writes each prompt as PEFT's adapter folder, ``directory/<name>/``. The base model is not written.

        Args:
            names: write only these.
            peft_type: PEFT's name of the method: "PREFIX_TUNING", or "CARTRIDGE", which also says how many positions
                are not trained. None: "CARTRIDGE" for prompts that have such positions, "PREFIX_TUNING" for others.
        """
        kind = checked_type(peft_type, DEEP_TYPES)
        facts = base_facts(self.base_model)
        for name in self.prompts.names if names is None else names:
            frozen: int | None = frozen_count(self.prompts, name)
            if kind == DEEP or (kind is None and not frozen):
                frozen = None
            values = self.prompts.snapshot(name)
            write_prefix(Path(directory) / name, values, self.runner.shape, facts, frozen=frozen)
            update_card(Path(directory) / name)

    def read_prompt(self, folder: PathLike[str] | str, *, loaded: Collection[str] = ()) -> Tensor:
        """[P, W] float32, the deep prompt of an adapter folder.

        Raises:
            ValueError: the prompt was made for a model of another shape.
        """
        return read_prefix(located(folder), self.runner.shape)[0]


def _check_no_empty_row(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    empty = input_ids.shape[1] == 0 if attention_mask is None else not (attention_mask != 0).any(1).all()
    if empty and len(input_ids):
        raise ValueError("`input_ids` must hold a token in each row because a deep prompt alone predicts nothing")


def _refusal(model: Any, reason: str) -> TypeError:
    return TypeError(f"{type(model).__name__} cannot run deep prompts: {reason}")
