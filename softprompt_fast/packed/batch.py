"""Packs a batch: each distinct prompt once, then the text of every row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..hf.embedding import EmbeddingTable, embedding_table, looked_up
from ..ops.assemble.autograd import token_update
from ..ops.assemble.checks import check_lengths
from ..ops.assemble.functional import assemble
from ..prompts.selection import Selection
from .layout import PackedLayout, RowGroup


@dataclass(eq=False)
class PackedInputs:
    """A packed batch as the model reads it."""

    inputs_embeds: Tensor
    """[1, K, D]"""
    position_ids: Tensor
    """[1, K]"""
    layout: PackedLayout


@dataclass(eq=False)
class SharedBatch(PackedInputs):
    """A packed batch, and the slot of each token of ``input_ids`` in it."""

    token_slots: Tensor
    """[B, T]: slot of each real token, -1 at padding. Tokens of shared text have the slot of the shared copy."""
    previous_slots: Tensor
    """[B, T]: slot of the vector before each real token, -1: none."""
    last_slots: Tensor
    """[B]: slot of the last vector of each row, -1 for an empty one."""


def pack_rows(
    selection: Selection,
    embedding: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None,
    *,
    fold: bool,
) -> SharedBatch:
    """Packs each distinct prompt once, then the text of every row.

    Args:
        selection: the prompts of the rows.
        embedding: the model's input embedding module.
        input_ids: [B, T]
        attention_mask: [B, T] or None.
        lengths: [B] real tokens on the host; None: counted, which waits for a GPU.
        fold: move text that all rows of a prompt share at their start into the prompt, where it runs once.
    """
    rows, tokens = input_ids.shape
    device = input_ids.device
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if lengths is None:
        lengths = [tokens] * rows if attention_mask is None else real.sum(1).tolist()
    check_lengths(lengths, rows, tokens)
    folded = [0] * rows
    input_ids, embedding = looked_up(embedding, input_ids)
    table = embedding_table(embedding)
    prompt_lengths = [prompt.shape[0] for prompt in selection.prompts]
    ranks = real.cumsum(1) - 1
    if fold and device.type == "cpu" and rows > 1:
        folded, selection = _fold_shared_text(selection, table, input_ids, real, lengths)
    mask = attention_mask
    if any(folded):
        shared_tokens = ranks < torch.tensor(folded)[:, None]
        kept = real if attention_mask is None else attention_mask  # its values are checked by assemble
        mask = kept.masked_fill(shared_tokens, 0)
    packed = assemble(
        input_ids,
        table.weight,
        selection.joined(device),
        selection.offsets,
        selection.ids,
        mask,
        token_factors=selection.token_factors(),
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

    # Slots of a row's vectors by their place in [prompt][text]: prompt and folded text are shared, the rest is its own.
    shared = torch.tensor(
        [
            (start, prompt_lengths[n] if n >= 0 else 0, f)
            for (start, _), n, f in zip(prefixes, selection.ids, folded, strict=True)
        ],
        dtype=torch.int64,
    ).view(-1, 3)
    start, virtual, common = shared.to(device, non_blocking=True).unbind(1)
    own = layout.rows.table[:, 0]

    def slot_of(rank: Tensor) -> Tensor:
        """[B, X] ranks among a row's real tokens (-1: the last virtual token) -> slots; -1: there is no such vector."""
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
    selection: Selection, table: EmbeddingTable, input_ids: Tensor, real: Tensor, lengths: Sequence[int]
) -> tuple[list[int], Selection]:
    """Per row, how many of its first tokens all rows of its prompt share; and the prompts followed by these tokens.

    Each row keeps at least one token of its own. Token vectors do not depend on the prompt, so its gradient does not
    change. The first part of a token update is added to the folded vectors; the rest of it begins after them.
    """
    folded = [0] * len(selection.ids)
    longer, updates = list(selection.prompts), list(selection.updates)
    for n, prompt in enumerate(selection.prompts):
        members = [row for row, used in enumerate(selection.ids) if used == n]
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
                text, updates[n] = updated_embeddings(table, first, a, b), (a[len(first) :], b)
            longer[n] = torch.cat([prompt, text.to(prompt.dtype)])
            for row in members:
                folded[row] = len(first)
    return folded, Selection(longer, selection.ids, updates, selection.width)


def updated_embeddings(table: EmbeddingTable, input_ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Ids [T] of a text -> vectors [T, D] with a token update [U, r], [r, D]; float32, or float64 if the table is."""
    update = token_update(a[None], b[None], len(input_ids), table.weight.dtype)[0]
    vectors = torch.nn.functional.embedding(input_ids, table.weight).to(update.dtype) * table.scale
    return vectors + torch.nn.functional.pad(update, (0, 0, 0, len(vectors) - len(update)))
