"""The ops in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, the fallback everywhere else.

``assemble`` takes what the native op takes and returns what it returns, bit for bit. Its gradient is PyTorch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NO_ERROR = torch.iinfo(torch.int64).max


def assemble(
    input_ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    prompt_offsets: Tensor,
    prompt_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    plan: Tensor | None,
    slots: int,
    width: int,
    prompt_segments: int,
    left: bool,
    mask_format: int,
    causal: bool,
    window: int,
    scale: float,
    token_update: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`softprompt_fast.assemble`; ``plan`` and the sizes are what it works out for an op."""
    rows, tokens = input_ids.shape
    device = input_ids.device
    no_rows = input_ids.new_zeros(rows, dtype=torch.int64)

    # Per row: real tokens, their ranks, and which token has a given rank.
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    counts = real.sum(1)
    ranks = real.cumsum(1) - 1
    columns = input_ids.new_zeros((rows, tokens + 1), dtype=torch.int64)
    columns = columns.scatter(1, torch.where(real, ranks, tokens), torch.arange(tokens, device=device).expand(rows, -1))

    # Per segment: its prompt, its row of text (-1: none), the position of its first vector.
    count = prompt_offsets.numel() - 1
    if plan is None:
        segments = torch.arange(rows, device=device)
        first_slot, length = segments * width, no_rows + width
        ids = prompt_ids if prompt_ids is not None else no_rows + (0 if count > 0 else -1)
        text_row, position, text_prompt = segments, no_rows, ids
    else:
        first_slot, length, text_prompt, position = plan.unbind(1)
        ids = text_prompt.clone()
        ids[prompt_segments:] = -1
        text_row = torch.arange(len(plan), device=device) - prompt_segments
    known = (ids >= 0) & (ids < count)
    bad_prompt = ~known & (ids != -1)
    offsets = F.pad(prompt_offsets, (0, 1))
    safe = torch.where(known, ids, 0)
    prompt_row, prompt_end = offsets[safe], offsets[safe + 1]
    bad_offset = known & ((prompt_row < 0) | (prompt_end < prompt_row) | (prompt_end > len(prompts)))
    prompt_length = torch.where(known & ~bad_offset, prompt_end - prompt_row, 0)

    text = torch.where(text_row >= 0, counts[text_row.clamp(min=0)] if rows else 0, 0)
    bad_length = (prompt_length > length) | (text > length - prompt_length)
    prompt_length = torch.where(prompt_length > length, 0, prompt_length)
    if plan is not None:
        bad_length = bad_length | (prompt_length + text != length)
    text = torch.minimum(text, length - prompt_length)
    begin = length - prompt_length - text if left and plan is None else torch.zeros_like(length)

    # Per slot: its segment, its place there, and what stands at it.
    slot = torch.arange(slots, device=device)
    segment = slot // max(width, 1) if plan is None else torch.repeat_interleave(length, output_size=slots)
    place = slot - first_slot[segment] - begin[segment]
    is_prompt = (place >= 0) & (place < prompt_length[segment])
    rank = place - prompt_length[segment]
    is_text = (rank >= 0) & (rank < text[segment])
    filled = is_prompt | is_text
    row = torch.where(is_text, text_row[segment], 0)
    column = columns[row, torch.where(is_text, rank, 0)] if rows else slot

    def of_token(values: Tensor) -> Tensor:
        return values[row, column] if values.numel() else values.new_zeros(slots)

    token_ids = of_token(input_ids).long()
    known_id = (token_ids >= 0) & (token_ids < len(embedding))
    vectors = embedding.new_zeros((slots, embedding.shape[1]))
    if len(embedding):
        found = F.embedding(torch.where(is_text & known_id, token_ids, 0), embedding)
        vectors = found * scale if scale != 1.0 else found
        if token_update is not None and token_update.numel():
            reach = token_update.shape[1]
            owner = text_prompt[segment]
            updated = is_text & (owner >= 0) & (owner < count) & (rank < reach)
            update = F.embedding(torch.where(updated, owner * reach + rank, 0), token_update.flatten(0, 1))
            moved = (found.to(update.dtype) * scale + update).to(embedding.dtype)
            vectors = torch.where(updated[:, None], moved, vectors)
        vectors = torch.where((is_text & known_id)[:, None], vectors, 0)
    if len(prompts):
        of_prompt = F.embedding(torch.where(is_prompt, prompt_row[segment] + place, 0), prompts).to(embedding.dtype)
        vectors = torch.where(is_prompt[:, None], of_prompt, vectors)

    lead = (1, slots) if plan is not None else (rows, width)
    nothing = input_ids.new_empty(0, dtype=torch.int64)
    if mask_format == 0:
        mask = nothing
    elif mask_format == 1:
        mask = filled.to(torch.int64 if attention_mask is None else attention_mask.dtype).view(lead)
    else:
        mask = _visible(begin, begin + prompt_length + text, width, causal, window)
        if mask_format == 3:
            hidden = torch.full((), torch.finfo(embedding.dtype).min, dtype=embedding.dtype, device=device)
            mask = torch.where(mask, torch.zeros_like(hidden), hidden)
    position_ids = torch.where(filled, position[segment] + place, 0).view(lead)
    labels_out = nothing if labels is None else torch.where(is_text, of_token(labels), -100).view(lead)
    own_segment = torch.arange(rows, device=device) + prompt_segments
    start = (first_slot + begin + prompt_length)[own_segment]
    placed = real & (ranks < text[own_segment][:, None])
    token_slots = torch.where(placed, start[:, None] + ranks, -1)
    prompt_slots = torch.where(prompt_length > 0, first_slot + begin, -1)
    row_ids = nothing
    if plan is not None:
        prompt_slots = prompt_slots[:prompt_segments]
        row_ids = text_row.clamp(min=-1)[segment]

    place_of = torch.arange(rows * tokens, device=device).view(rows, tokens)
    bad_id = placed & ((input_ids < 0) | (input_ids >= len(embedding)))
    bad_mask = torch.zeros_like(real) if attention_mask is None else placed & (attention_mask != 1)
    status = torch.stack(
        [
            _first(bad_id, place_of),
            _first(bad_prompt, torch.arange(len(bad_prompt), device=device)),
            _first(bad_mask, place_of),
            _first(bad_length, text_row.clamp(min=0)),
            _first(bad_offset, ids),
        ]
    )
    embeds = vectors.view(*lead, embedding.shape[1])
    return embeds, mask, position_ids, labels_out, token_slots, prompt_slots, row_ids, status


def _visible(begin: Tensor, end: Tensor, width: int, causal: bool, window: int) -> Tensor:
    """Boolean ``[B, 1, S, S]``: query (dim 2) sees key (dim 3). Windows as in transformers' masking utilities."""
    place = torch.arange(width, device=begin.device)
    query, key = place[None, :, None], place[None, None, :]
    begin, end = begin[:, None, None], end[:, None, None]
    seen = (key >= begin) & (key < end)
    if causal:
        seen = seen & (key <= query)
    if window > 0:
        seen = seen & ((query - key < window) if causal else ((query - key).abs() <= window))
    filled = (query >= begin) & (query < end)
    return torch.where(filled, seen, query == key)[:, None]


def _first(bad: Tensor, index: Tensor) -> Tensor:
    """The smallest index at which ``bad`` holds, or NO_ERROR."""
    if bad.numel() == 0:
        return torch.full((), NO_ERROR, device=bad.device)
    return torch.where(bad, index, NO_ERROR).amin()
