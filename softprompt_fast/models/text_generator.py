"""``generate`` of decoders with soft prompts: after compiled prompts where that works, else prompt by prompt."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..base.errors import Unsupported
from ..base.modules import evaluating
from ..compiled.continuation import Continuation
from ..compiled.prompt_cache import PromptCache
from ..hf import generation, generation_options
from ..packed.runner import PackedRunner
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..prompts.selection import Selection
from .padded_runner import PaddedRunner

logger = logging.getLogger("softprompt_fast")


class TextGenerator:
    """Generates text with one model.

    Args:
        runner: runs the packed layout; None: prompts are never compiled.
    """

    def __init__(self, model: Any, runner: PackedRunner | None) -> None:
        self.model = model
        self.continuation = None if runner is None else Continuation(runner)
        """Generates after compiled prompts; None: this does not work for the model."""
        self._compiled = PromptCache()

    def close(self) -> None:
        """Frees the memory of graphs."""
        if self.continuation is not None and self.continuation.graphs is not None:
            self.continuation.graphs.close()

    def can_compile(self, selection: Selection, attention_mask: Tensor, options: dict[str, Any]) -> bool:
        """Whether a batch can follow compiled prompts: each row has a text, of the model's own vectors and one type."""
        usable = self.continuation is not None and self.continuation.runner.unsupported is None
        plain = all(update is None for update in selection.updates)
        wants_attentions = generation_options.setting(self.model, options, "output_attentions")
        typed = generation_options.effective_types(self.model, options) is not None
        return usable and plain and not wants_attentions and not typed and bool((attention_mask != 0).any(1).all())

    def generate(
        self,
        padded: PaddedRunner,
        bank: FastSoftPrompt,
        selection: Selection,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_ids: PromptIds,
        options: dict[str, Any],
    ) -> Any:
        """The result of ``generate`` for rows [B, T]; `selection` holds the prompts of the bank that they use."""
        if self.continuation is not None and self.can_compile(selection, attention_mask, options):
            try:
                table = self._compiled.table(self.continuation.runner, selection.prompts)
                return self.continuation.generate(table, selection.prefixes, input_ids, attention_mask, options)
            except Unsupported as error:
                self.continuation = None
                logger.warning("%s generates without compiled prompts: %s", type(self.model).__name__, error)
        return self._generate_by_prompt(padded, bank, selection, input_ids, attention_mask, prompt_ids, options)

    def _generate_by_prompt(
        self,
        padded: PaddedRunner,
        bank: FastSoftPrompt,
        selection: Selection,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_ids: PromptIds,
        options: dict[str, Any],
    ) -> Any:
        """Rows of one prompt and one text length run together, so that no padding is anywhere; for any decoder."""
        options = generation_options.checked_options(self.model, options, generation_options.REFUSED_WITH_VECTORS)
        lengths = (attention_mask != 0).sum(1).tolist()
        keys = [
            (selection.ids[row], length, row if length == 0 else 0)  # transformers reads the last id of several rows
            for row, length in enumerate(lengths)
        ]

        def run(rows: list[int], ids: Tensor, mask: Tensor, own: dict[str, Any]) -> Any:
            def embed(texts: Tensor) -> Tensor:
                every = prompt_ids
                if prompt_ids is not None and not isinstance(prompt_ids, str):
                    one = prompt_ids[rows[0]]
                    every = [int(one) if isinstance(one, Tensor) else one] * len(texts)
                vectors = padded.assemble(bank, texts, None, every, None, "left").inputs_embeds
                assert vectors is not None
                return vectors

            length = selection.prefixes[rows[0]][1]
            return generation.generate_with_prompt_vectors(self.model, ids, embed, length, own)

        with evaluating(self.model):
            return generation.generate_rows(self.model, input_ids, attention_mask, options, keys, run)
