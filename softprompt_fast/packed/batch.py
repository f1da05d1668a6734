"""Packs a batch: each distinct prompt once, then the text of every row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..hf.embedding import EmbeddingTable, embedding_table
from ..ops.assemble.autograd import token_update
from ..ops.assemble.functional import assemble
from ..prompts.fast_soft_prompt import Chosen, FastSoftPrompt, PromptIds
from .layout import PackedLayout, RowGroup


@dataclass(eq=False)
class PackedInputs:
    """What a model runs on."""

    inputs_embeds: Tensor
    """[1, K, D]"""
    position_ids: Tensor
    """[1, K]"""
    layout: PackedLayout


@dataclass(eq=False)
class SharedBatch(PackedInputs):
    """A packed batch, and where each token of ``input_ids`` stands in it."""

    token_slots: Tensor
    """[B, T]: slot of each real token, -1 at padding. Tokens of shared text have the slot of the shared copy."""
    previous_slots: Tensor
    """[B, T]: slot of what stands before each real token, -1 where nothing does."""
    last_slots: Tensor
    """[B]: slot of the last vector of each row, -1 for an empty one."""


def pack_rows(
    bank: FastSoftPrompt,
    embedding: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_ids: PromptIds,
    lengths: Sequence[int] | None,
    *,
    fold: bool,
) -> SharedBatch:
    """Packs rows behind their prompts, each distinct prompt once.

    Args:
        bank: the prompts.
        embedding: the model's input embedding module.
        input_ids: [B, T]
        attention_mask: [B, T] or None.
        prompt_ids: of each row.
        lengths: [B] real tokens on the host; None: counted, which waits for a GPU.
        fold: count text that all rows of a prompt share at their start to the prompt.
    """
    rows, tokens = input_ids.shape
    device = input_ids.device
    chosen = bank.choose(prompt_ids, rows)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if lengths is None:
        lengths = [tokens] * rows if attention_mask is None else real.sum(1).tolist()
    folded = [0] * rows
    table = embedding_table(embedding)
    prompt_lengths = [tensor.shape[0] for tensor in chosen.tensors]
    ranks = real.cumsum(1) - 1
    if fold and device.type == "cpu" and rows > 1:
        folded, chosen = _fold_shared_text(chosen, table, input_ids, real, lengths)
    mask = attention_mask
    if any(folded):
        shared_tokens = ranks < torch.tensor(folded)[:, None]
        kept = real if attention_mask is None else attention_mask  # its values are checked by assemble
        mask = kept.masked_fill(shared_tokens, 0)
    packed = assemble(
        input_ids,
        table.weight,
        chosen.joined(bank, device),
        chosen.offsets,
        chosen.ids,
        mask,
        token_factors=chosen.token_factors(),
        layout="packed",
        embedding_scale=table.scale,
        padding_idx=table.padding_idx,
        lengths=[n - f for n, f in zip(lengths, folded, strict=True)],
    )
    info = packed.packed
    assert info is not None
    count = len(info.prompts)
    prompt_starts = list(accumulate(info.lengths[:count], initial=0))
    prefixes = [(prompt_starts[g], info.lengths[g]) if g >= 0 else (0, 0) for g in info.row_prompts]
    layout = PackedLayout(
        prompts=RowGroup.of(0, info.lengths[:count], [(0, 0)] * count, device),
        rows=RowGroup.of(prompt_starts[-1], info.lengths[count:], prefixes, device),
    )

    # Slots of a row's vectors by their place in [prompt][text]: prompt and folded text are shared, the rest its own.
    shared = torch.tensor(
        [
            (start, prompt_lengths[n] if n >= 0 else 0, f)
            for (start, _), n, f in zip(prefixes, chosen.ids, folded, strict=True)
        ],
        dtype=torch.int64,
    ).view(-1, 3)
    start, virtual, common = shared.to(device, non_blocking=True).unbind(1)
    own = layout.rows.query_table[:, 0]

    def slot_of(rank: Tensor) -> Tensor:
        """[B, X] ranks among a row's real tokens, -1 the last virtual token -> slots; -1 where nothing stands."""
        at = torch.where(
            rank < common[:, None], start[:, None] + virtual[:, None] + rank, own[:, None] + rank - common[:, None]
        )
        return torch.where(rank + virtual[:, None] >= 0, at, -1)

    last = torch.tensor([n - 1 for n in lengths], dtype=torch.int64).to(device, non_blocking=True)
    return SharedBatch(
        inputs_embeds=packed.inputs_embeds,
        position_ids=packed.position_ids,
        layout=layout,
        token_slots=torch.where(real, slot_of(ranks), -1),
        previous_slots=torch.where(real, slot_of(ranks - 1), -1),
        last_slots=slot_of(last[:, None])[:, 0],
    )


def _fold_shared_text(
    chosen: Chosen, table: EmbeddingTable, input_ids: Tensor, real: Tensor, lengths: Sequence[int]
) -> tuple[list[int], Chosen]:
    """Per row, how many of its first tokens all rows of its prompt share; and the prompts with those tokens behind.

    Each row keeps a token of its own. Vectors of tokens carry no gradient of the prompt, so the prompt's is as before.
    A token update is part of the folded vectors, and what is left of it begins behind them.
    """
    folded = [0] * len(chosen.ids)
    longer, updates = list(chosen.tensors), list(chosen.updates)
    for n, prompt in enumerate(chosen.tensors):
        members = [row for row, used in enumerate(chosen.ids) if used == n]
        common = min(lengths[row] for row in members) - 1
        if len(members) < 2 or common < 1:
            continue
        first = input_ids[members[0]][real[members[0]]][:common]
        for row in members[1:]:
            differs = (input_ids[row][real[row]][: len(first)] != first).nonzero()
            first = first[: int(differs[0])] if len(differs) else first
        known = (first >= 0) & (first < len(table.weight))
        if len(first) and known.all():  # an unknown id is left to assemble, which names its place
            update = updates[n]
            if update is None:
                text = table(first).detach()
            else:
                a, b = update
                text, updates[n] = _updated(table, first, a, b), (a[len(first) :], b)
            longer[n] = torch.cat([prompt, text.to(prompt.dtype)])
            for row in members:
                folded[row] = len(first)
    return folded, Chosen(longer, chosen.ids, updates)


def _updated(table: EmbeddingTable, input_ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[T] ids of a text from its start -> [T, D] float32 (float64 of float64), with a token update [U, r], [r, D]."""
    update = token_update(a[None], b[None], len(input_ids), table.weight.dtype)[0]
    vectors = torch.nn.functional.embedding(input_ids, table.weight).to(update.dtype) * table.scale
    return vectors + torch.nn.functional.pad(update, (0, 0, 0, len(vectors) - len(update)))
