"""Runs packed texts after trained keys and values (deep prompts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hf.architecture import cache_keyword
from ..hf.embedding import embedding_table, looked_up, token_vectors, vectors_like
from ..packed.batch import SharedBatch, pack_rows
from ..packed.layout import PackedLayout, RowGroup
from ..packed.runner import PackedRunner
from ..packed.self_check import SLACK
from ..prompts.selection import Selection
from .compile import layered, slot_shape


class PrefixRunner(PackedRunner):
    """Runs one model on packed texts that follow trained keys and values. There is no padded layout to fall back to."""

    slack = SLACK

    def __init__(self, model: Any, *, check: bool = True, cuda_graphs: bool = True) -> None:
        super().__init__(model, check=check, shared_text=None, cuda_graphs=cuda_graphs)
        self.shape = slot_shape(model)

    def compiled(self, selection: Selection) -> Tensor | None:
        """[L, 2, sum of P_n, H', E] of the selected prompts [P_n, W], in the model's dtype; None: no prompts.

        Raises:
            ValueError: a prompt has a token update.
        """
        if any(update is not None for update in selection.updates):
            raise ValueError("a prompt has a token update, which deep prompts cannot use")
        if not selection.prompts:
            return None
        return self._states(selection.joined(vectors_like(self.model.get_input_embeddings()).device))

    def _states(self, prompts: Tensor) -> Tensor:
        return layered(prompts.to(vectors_like(self.model.get_input_embeddings())), self.shape).contiguous()

    def pack(
        self,
        selection: Selection,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        lengths: Sequence[int] | None,
        *,
        embedding: Any = None,
        fold: bool | None = None,
    ) -> SharedBatch:
        """The packed batch of the rows' texts [B, T]. Nothing predicts a row's first token."""
        rows, tokens = input_ids.shape
        compiled = self.compiled(selection)
        if lengths is None:
            lengths = [tokens] * rows if attention_mask is None else (attention_mask != 0).sum(1).tolist()
        embedding = self.model.get_input_embeddings() if embedding is None else embedding
        input_ids, embedding = looked_up(embedding, input_ids)
        no_prompts = Selection([], [-1] * rows, [], embedding_table(embedding).weight.shape[1])
        batch = pack_rows(no_prompts, embedding, input_ids, attention_mask, lengths, fold=False)
        prefixes = selection.prefixes
        virtual = torch.tensor([count for _, count in prefixes], dtype=torch.int64)
        virtual = virtual.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        layout = PackedLayout(
            prompts=batch.layout.prompts,
            rows=RowGroup.of(0, lengths, prefixes, input_ids.device),
            compiled=compiled,
        )
        positions = batch.position_ids + virtual.to(input_ids.device, non_blocking=True)
        batch = replace(batch, position_ids=positions, layout=layout)
        self._check_room(batch, selection)
        return batch

    def logits_alone(
        self,
        prompt: Tensor | None,
        input_ids: Tensor,
        places: Tensor,
        *,
        gradient: bool,
        update: tuple[Tensor, Tensor] | None = None,
        embedding: Any = None,
    ) -> Tensor:
        """[M, V] at `places` [M] among the tokens [T] of a row that runs by itself on a cache of its prompt."""
        from transformers import DynamicCache

        vectors = token_vectors(self.model.get_input_embeddings() if embedding is None else embedding, input_ids)
        cache: Any = DynamicCache()
        for layer, (key, value) in enumerate(() if prompt is None else self._states(prompt)):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        first = self.first_position + (0 if prompt is None else len(prompt))
        positions = torch.arange(first, first + len(vectors), device=vectors.device)
        inputs = {"inputs_embeds": vectors[None], "position_ids": positions[None], cache_keyword(self.model): cache}
        return self.logits_at(places, **inputs)[1]
