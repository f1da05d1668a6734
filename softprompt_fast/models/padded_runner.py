"""Runs a model on padded batches in which every row carries its prompt: for any architecture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hf.architecture import ForwardTraits, check_room, returning_mappings, with_pad_token
from ..hf.cpu_linear import faster_products
from ..hf.embedding import looked_up
from ..ops.assemble.batch import PromptedBatch
from ..packed.spans import LOGITS, POSITIONS
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..tasks.encoding import IGNORED
from .spans import span_loss, without_padding

LossFunction = Callable[..., Tensor]
# Fields of a model's output with one entry per input position, and fields that are tuples of such tensors.
ALIGNED = ("logits", "last_hidden_state", "encoder_last_hidden_state", *LOGITS)
ALIGNED_TUPLES = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True)
class PaddedRunner:
    """Runs one model on padded batches."""

    model: Any
    traits: ForwardTraits

    def assemble(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        labels: Tensor | None,
        padding_side: str,
        embedding: Any = None,
    ) -> PromptedBatch:
        """The batch with each row's prompt in front of its tokens.

        Args:
            embedding: the table [V, D] or module that gives the tokens' vectors; None: the model's.

        Raises:
            ValueError: a row and its prompt are longer than the model's positions.
        """
        embedding = self.model.get_input_embeddings() if embedding is None else embedding
        input_ids, embedding = looked_up(embedding, input_ids)
        batch: PromptedBatch = bank(
            input_ids,
            attention_mask,
            embedding=embedding,
            prompt_ids=prompt_ids,
            labels=labels,
            padding_side=padding_side,
        )
        limit, width = self.traits.context_length, batch.inputs_embeds.shape[1]
        if limit is not None and width > limit:
            _drop_columns(batch, limit)
        return batch

    def forward(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        prompt_ids: PromptIds,
        *,
        return_logits: bool,
        loss_function: LossFunction | None,
        options: dict[str, Any],
        embedding: Any = None,
        prompt_columns: int = 0,
    ) -> Any:
        """The model's output as :meth:`SoftPromptModel.forward` returns it.

        Args:
            prompt_columns: 0, or the length P of every row's prompt: its columns come before those of ``input_ids``.
        """
        per_token = labels is not None and self.traits.labels_per_token
        side = "left" if self.traits.pools_last_token else "right"
        moved = labels if per_token else None
        batch = self.assemble(bank, input_ids, attention_mask, prompt_ids, moved, side, embedding)
        inputs = {k: v for k, v in batch.items() if k != "position_ids" or k in self.traits.parameters}
        start = end = None
        if self.traits.answers_spans:
            start, end = (options.get(name) for name in POSITIONS)
            options = {key: value for key, value in options.items() if key not in POSITIONS}
        types = options.get("token_type_ids")
        if types is not None:
            options = options | {"token_type_ids": padded_types(types, batch)}
        if labels is not None and not per_token:
            inputs["labels"] = labels
        if "use_cache" in self.traits.parameters:
            options = {"use_cache": False} | options
        if loss_function is not None and labels is not None:
            items = {key: options.pop(key) for key in ("num_items_in_batch",) if key in options}
            output, loss = self._with_own_loss(inputs, per_token, loss_function, items, options)
            output["loss"] = loss
        else:
            output = self._run(inputs, options)
        if start is not None and end is not None:
            output["loss"] = span_loss(output, batch, (start, end))
        if not return_logits and self.traits.predicts_next_token and getattr(output, "logits", None) is not None:
            output["logits"] = None
        return self._align(output, batch, prompt_columns)

    def _with_own_loss(
        self,
        inputs: dict[str, Any],
        per_token: bool,
        loss_function: LossFunction,
        items: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """A decoder's or encoder-decoder's output, and the caller's loss of it."""
        if not (per_token and self.traits.predicts_next_token) and not self.traits.encoder_decoder:
            raise ValueError("`loss_function` cannot be given because this model's labels are not tokens of a text")
        labels = inputs["labels"]
        if per_token:  # an encoder-decoder needs its labels: they become the decoder's input
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        output = self._run(inputs, options)
        logits = output.logits
        if per_token:
            logits, labels = logits[:, :-1], labels[:, 1:]
        row, column = (labels != IGNORED).nonzero(as_tuple=True)
        return output, loss_function(logits[row, column], labels[row, column], row, **items)

    def logits_after(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        places: Tensor | None = None,
        embedding: Any = None,
    ) -> Tensor:
        """[M, V] after the tokens at `places` [M, 2] (row, column); None: [B, V] after each row's last vector."""
        every: Tensor
        if places is not None:
            every = self.forward(
                bank,
                input_ids,
                attention_mask,
                None,
                prompt_ids,
                return_logits=True,
                loss_function=None,
                options={},
                embedding=embedding,
            ).logits
            return every[places[:, 0], places[:, 1]]
        # Padding on the right: positions are then the same whether a model counts them itself or is told them.
        batch = self.assemble(bank, input_ids, attention_mask, prompt_ids, None, "right", embedding)
        slots = torch.arange(batch.position_ids.shape[1], device=batch.position_ids.device)
        real = torch.ones_like(batch.position_ids) if batch.attention_mask is None else batch.attention_mask != 0
        last = (slots * real).amax(1)
        options: dict[str, Any] = {}
        if "use_cache" in self.traits.parameters:
            options["use_cache"] = False
        rows = torch.arange(len(last), device=last.device)
        if "logits_to_keep" not in self.traits.parameters:
            every = self._run(dict(batch), options).logits
            return every[rows, last]
        kept, place = last.unique(return_inverse=True)
        logits: Tensor = self._run(dict(batch), options | {"logits_to_keep": kept}).logits
        return logits[rows, place]

    def _run(self, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        slots = inputs["inputs_embeds"].shape[:2].numel()
        named = with_pad_token(self.model.config) if self.traits.pools_last_token else nullcontext()
        with returning_mappings(self.model.config), faster_products(self.model, slots), named:
            return self.model(**inputs, **options)

    def _align(self, output: Any, batch: PromptedBatch, prompt_columns: int) -> Any:
        """Aligns logits and hidden states with prompts' columns and ``input_ids``."""
        aligned, tuples = set(ALIGNED), set(ALIGNED_TUPLES)
        if not self.traits.labels_per_token:
            aligned.discard("logits")
        if self.traits.encoder_decoder:
            aligned.discard("last_hidden_state")
            tuples.discard("hidden_states")
        for name in aligned:
            if getattr(output, name, None) is not None:
                output[name] = in_columns(output[name], batch, prompt_columns)
        for name in LOGITS:
            if getattr(output, name, None) is not None:
                output[name] = without_padding(output[name], batch, prompt_columns)
        for name in tuples:
            if getattr(output, name, None) is not None:
                output[name] = tuple(in_columns(states, batch, prompt_columns) for states in output[name])
        return output


def in_columns(values: Tensor, batch: PromptedBatch, prompt_columns: int) -> Tensor:
    """[B, S, ...] -> [B, P + T, ...]: the prompt's columns, then those of ``input_ids``; zeros at padding.

    Padding before a row's first token hides the vector before it, so the column before it repeats the prompt's last.

    Args:
        prompt_columns: 0, or the length P of every row's prompt.
    """
    if not prompt_columns:
        return batch.unpack(values)
    prompts = batch.prompt_slots[:, None] + torch.arange(prompt_columns, device=values.device)
    columns = torch.cat([prompts, batch.token_slots], 1)
    before = F.pad(torch.where(batch.token_slots >= 0, batch.token_slots - 1, -1), (prompt_columns - 1, 1), value=-1)
    columns = torch.where(columns >= 0, columns, before)
    aligned = values.flatten(0, 1)[columns.clamp(min=0)]
    return aligned.masked_fill((columns < 0).view(*columns.shape, *[1] * (aligned.dim() - 2)), 0)


def padded_types(types: Tensor, batch: PromptedBatch) -> Tensor:
    """[B, S], the token types [B, T] of the texts; 0 for prompts and padding."""
    padded = types.new_zeros(batch.inputs_embeds.shape[:2])
    real = batch.token_slots >= 0
    padded.view(-1)[batch.token_slots[real]] = types[real]
    return padded


def _drop_columns(batch: PromptedBatch, limit: int) -> None:
    """Leaves `limit` columns of a batch that has more. They are padding if every row fits, which is checked.

    S is the longest prompt and the longest text together, which need not be in the same row.
    """
    width = batch.inputs_embeds.shape[1]
    mask = batch.attention_mask
    assert mask is not None
    tokens = (batch.token_slots >= 0).sum(1)
    check_room(((mask != 0).sum(1) - tokens).tolist(), tokens.tolist(), limit)
    first = width - limit if batch.padding_side == "left" else 0
    columns = slice(first, first + limit)
    batch.inputs_embeds = batch.inputs_embeds[:, columns]
    batch.attention_mask = mask[:, columns]
    batch.position_ids = batch.position_ids[:, columns]
    batch.labels = None if batch.labels is None else batch.labels[:, columns]
    for name in ("token_slots", "prompt_slots"):
        slots = getattr(batch, name)
        moved = slots.div(width, rounding_mode="floor") * limit + slots % width - first
        setattr(batch, name, moved.where(slots >= 0, slots))
