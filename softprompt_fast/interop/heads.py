"""Classification, tagging and question-answering heads after a prompt, on the padded layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.modules import evaluating
from ..hf import architecture
from ..hf.architecture import ForwardTraits
from ..hf.embedding import token_vectors, vectors_like, vocabulary_size
from ..hf.input_check import check_inputs
from ..models.call import known_options, texts_of
from ..models.padded_runner import PaddedRunner, in_columns, padded_types
from ..ops.assemble.batch import PromptedBatch
from ..packed.runner import ExecutionReport
from ..prompts.fast_soft_prompt import FastSoftPrompt

SPANS = ("start_logits", "end_logits")
TOLERANCE = 1e-2
"""Only rounding may differ between a row alone and beside a longer one."""


class HeadRunner:
    """Runs a model with a head after one prompt, in which padding never changes a row's result.

    Args:
        base_model: a sequence classification, token classification or question answering model.

    Raises:
        TypeError: a row beside a longer one gets another result than alone; with the reason.
    """

    def __init__(self, base_model: Any) -> None:
        name = type(base_model).__name__
        if "inputs_embeds" not in architecture.forward_parameters(base_model):
            raise TypeError(f"{name} cannot be accelerated: its forward takes no inputs_embeds")
        check_inputs(base_model)
        self.base_model = base_model
        self.traits = ForwardTraits.of(base_model)
        self.reported: set[str] = set()
        self._check_rows()

    def execution_report(self) -> ExecutionReport:
        """Heads run in the padded layout."""
        return ExecutionReport("padded", "only language-modelling heads can share a prompt's hidden states", {})

    def unload(self) -> None:
        """Nothing of the base model has been changed."""

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        prompts: FastSoftPrompt,
        prompt_columns: int,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The base model's output, aligned with the prompt's columns and then those of ``input_ids`` [B, T].

        Args:
            labels: [B] or [B, C] of sequence classification; [B, T] of token classification.
            start_positions, end_positions: [B], columns of ``input_ids``; others are ignored, as transformers does it.
        """
        options = known_options(options, self.traits, self.reported)
        types = options.pop("token_type_ids", None)
        texts = texts_of(self.base_model, input_ids, attention_mask, inputs_embeds, types)
        per_token = labels is not None and self._tags
        batch = PaddedRunner(self.base_model, self.traits).assemble(
            prompts,
            texts.input_ids,
            attention_mask,
            None,
            labels if per_token else None,
            "left" if self.pools_last else "right",
            texts.embedding,
        )
        inputs = dict(batch) | options
        if labels is not None and not per_token:
            inputs["labels"] = labels
        if types is not None:
            inputs["token_type_ids"] = padded_types(types, batch)
        if "use_cache" in self.traits.parameters:
            inputs.setdefault("use_cache", False)
        with architecture.returning_mappings(self.base_model.config):
            output = self.base_model(**inputs)
        if start_positions is not None and end_positions is not None:
            output = type(output)(loss=_span_loss(output, batch, start_positions, end_positions), **output)
        self._align(output, batch, prompt_columns)
        as_mapping = getattr(self.base_model.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_mapping else output.to_tuple()

    @property
    def _tags(self) -> bool:
        return architecture.is_named(self.base_model, "ForTokenClassification")

    @property
    def pools_last(self) -> bool:
        """Whether the result is that of a row's last position: sequence classification on a decoder."""
        return self.traits.pools_last_token and self.traits.causal

    def _align(self, output: Any, batch: PromptedBatch, prompt_columns: int) -> None:
        if self._tags:
            output["logits"] = in_columns(output["logits"], batch, prompt_columns)
        for name in SPANS:
            if output.get(name) is not None:
                values = in_columns(output[name], batch, prompt_columns)
                padding = F.pad(batch.token_slots < 0, (prompt_columns, 0), value=False)
                output[name] = values.masked_fill(padding, torch.finfo(values.dtype).min)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(in_columns(x, batch, prompt_columns) for x in output["hidden_states"])

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Compares a row alone with the same row beside a longer one, with padding on either side."""
        embedding = self.base_model.get_input_embeddings()
        ids = torch.arange(4, device=vectors_like(embedding).device) % vocabulary_size(embedding)
        vectors = token_vectors(embedding, ids)[None]
        prompts = FastSoftPrompt.holding({"any": vectors[0, :1].clone()}, vectors.shape[2])
        both = torch.cat([vectors, vectors])
        with evaluating(self.base_model):
            alone = self._numbers(self(inputs_embeds=vectors[:, :2], prompts=prompts, prompt_columns=1))
            for kept in (slice(0, 2), slice(2, 4)):
                both[1, kept] = vectors[0, :2]
                mask = torch.ones(2, 4, dtype=torch.int64, device=vectors.device)
                mask[1] = 0
                mask[1, kept] = 1
                beside = self(inputs_embeds=both, attention_mask=mask, prompts=prompts, prompt_columns=1)
                numbers = self._numbers(beside)[1:]
                if numbers.dim() > 2 or self.traits.labels_per_token:
                    numbers = torch.cat([numbers[:, :1], numbers[:, 1:][:, kept]], 1)
                difference = ((numbers - alone).abs().max() / alone.abs().max().clamp(min=1e-12)).item()
                if not difference <= TOLERANCE * (1 if vectors.dtype.itemsize > 2 else 10):
                    raise TypeError(
                        f"{type(self.base_model).__name__} cannot be accelerated: a row beside a longer one differs "
                        f"from the row alone by {difference:.1e} of its largest number"
                    )

    def _numbers(self, output: Any) -> Tensor:
        values: Tensor = output[SPANS[0]] if output.get(SPANS[0]) is not None else output["logits"]
        return values.double()


def _span_loss(output: Any, batch: PromptedBatch, start: Tensor, end: Tensor) -> Tensor:
    """The mean loss of the two ends of each span [B]; positions outside the text are ignored.

    Padding takes no part in the softmax, so that a row's loss does not depend on the length of others.
    """
    width = output[SPANS[0]].shape[1]
    mask = batch.attention_mask
    padding = torch.zeros((), dtype=torch.bool, device=start.device) if mask is None else mask == 0
    losses = []
    for name, position in zip(SPANS, (start, end), strict=True):
        column = (position.squeeze(-1) if position.dim() > 1 else position).clamp(min=0)
        inside = column < batch.token_slots.shape[1]
        slot = batch.token_slots.gather(1, column.where(inside, 0)[:, None])[:, 0]
        target = torch.where(inside & (slot >= 0), slot % width, -100)
        logits = output[name].masked_fill(padding, torch.finfo(output[name].dtype).min)
        losses.append(F.cross_entropy(logits, target))
    return (losses[0] + losses[1]) / 2
