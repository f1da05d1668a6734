"""Runs packed texts after trained keys and values (deep prompts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..hf.embedding import embedding_table
from ..packed.batch import SharedBatch, pack_rows
from ..packed.layout import PackedLayout, RowGroup
from ..packed.runner import PackedRunner
from ..packed.self_check import SLACK
from ..prompts.fast_soft_prompt import Chosen, FastSoftPrompt, PromptIds
from .compile import layered, slot_shape


class PrefixRunner(PackedRunner):
    """Runs one model on packed texts behind trained keys and values. There is no padded layout to fall back to.

    Raises:
        TypeError: a model that cannot run so, with the reason; also later, when running shows it.
    """

    slack = SLACK

    def __init__(self, model: Any, *, check: bool = True) -> None:
        super().__init__(model, check=check, shared_text=None)
        if self.unsupported:
            raise TypeError(_refusal(model, self.unsupported))
        self.shape = slot_shape(model)
        self._no_prompts = FastSoftPrompt(model.get_input_embeddings().weight.shape[1])

    def compiled(self, prompts: Sequence[Tensor]) -> Tensor | None:
        """[L, 2, sum of P_n, H', E] of prompts [P_n, W], in the model's dtype; None: there are none."""
        if not prompts:
            return None
        weight = self.model.get_input_embeddings().weight
        joined = prompts[0] if len(prompts) == 1 else torch.cat(list(prompts))
        return layered(joined.to(weight), self.shape).contiguous()

    def pack(
        self,
        bank: FastSoftPrompt,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_ids: PromptIds,
        lengths: Sequence[int] | None,
    ) -> SharedBatch:
        """The packed batch of the rows' texts [B, T]. A row's first token is predicted by nothing."""
        rows, tokens = input_ids.shape
        chosen = _plain(bank.choose(prompt_ids, rows))
        if lengths is None:
            lengths = [tokens] * rows if attention_mask is None else (attention_mask != 0).sum(1).tolist()
        embedding = self.model.get_input_embeddings()
        batch = pack_rows(self._no_prompts, embedding, input_ids, attention_mask, [None] * rows, lengths, fold=False)
        starts = chosen.offsets
        prefixes = [(starts[n], starts[n + 1] - starts[n]) if n >= 0 else (0, 0) for n in chosen.ids]
        virtual = torch.tensor([count for _, count in prefixes], dtype=torch.int64)
        virtual = virtual.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        layout = PackedLayout(
            prompts=batch.layout.prompts,
            rows=RowGroup.of(0, lengths, prefixes, input_ids.device),
            compiled=self.compiled(chosen.tensors),
        )
        positions = batch.position_ids + virtual.to(input_ids.device, non_blocking=True)
        return replace(batch, position_ids=positions, layout=layout)

    def logits_alone(
        self,
        prompt: Tensor | None,
        input_ids: Tensor,
        places: Tensor,
        *,
        gradient: bool,
        update: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[M, V] at `places` [M] among the tokens [T] of a row that runs by itself on a cache of its prompt."""
        from transformers import DynamicCache

        vectors = embedding_table(self.model.get_input_embeddings())(input_ids)
        cache: Any = DynamicCache()
        compiled = None if prompt is None else self.compiled([prompt])
        for layer, (key, value) in enumerate(() if compiled is None else compiled):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        positions = torch.arange(len(vectors), device=vectors.device) + (0 if prompt is None else len(prompt))
        return self.logits_at(places, inputs_embeds=vectors[None], position_ids=positions[None], past_key_values=cache)[
            1
        ]

    def give_up(self, reason: str) -> NoReturn:
        self.unsupported = reason
        raise TypeError(_refusal(self.model, reason))


def _plain(chosen: Chosen) -> Chosen:
    if any(update is not None for update in chosen.updates):
        raise ValueError("`prompts` must not have token updates: deep prompts run without them")
    return chosen


def _refusal(model: Any, reason: str) -> str:
    return f"{type(model).__name__} cannot run deep prompts: {reason}"
