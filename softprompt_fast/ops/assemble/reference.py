"""``assemble`` in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, and the fallback.

It takes what the native op takes and returns the same bits. Its gradient is PyTorch's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extension.contract import NO_ERROR, AssembleCall, MaskFormat


class _Segments(NamedTuple):
    """One run of slots with at most one prompt and one row's text: rows padded, prompts and then rows packed."""

    first_slot: Tensor
    begin: Tensor  # padding in front
    prompt: Tensor  # of its vectors, -1 for none
    prompt_row: Tensor
    prompt_length: Tensor
    text_row: Tensor  # negative for none
    text_prompt: Tensor  # of its text
    text: Tensor  # tokens
    position: Tensor  # of its first vector
    length: Tensor
    bad_prompt: Tensor
    bad_offset: Tensor
    bad_length: Tensor


class _Slots(NamedTuple):
    """One output vector each."""

    segment: Tensor
    place: Tensor  # among the segment's real slots
    rank: Tensor  # among the row's real tokens
    is_prompt: Tensor
    is_text: Tensor
    row: Tensor  # of input_ids, 0 where there is no token
    column: Tensor


def assemble(call: AssembleCall) -> tuple[Tensor, ...]:
    """The outputs of the op for this call."""
    rows, device = len(call.input_ids), call.input_ids.device
    offsets, ids = call.prompt_offsets, call.prompt_ids
    call = call._replace(prompt_offsets=offsets.to(device), prompt_ids=None if ids is None else ids.to(device))
    nothing = call.input_ids.new_empty(0, dtype=torch.int64)
    real = torch.ones_like(call.input_ids, dtype=torch.bool)
    if call.attention_mask is not None:
        real = call.attention_mask != 0
    ranks = real.cumsum(1) - 1
    segments = _segments(call, real.sum(1))
    slots = _slots(call, segments, real, ranks)
    filled = slots.is_prompt | slots.is_text

    lead = (1, call.slots) if call.plan is not None else (rows, call.width)
    embeds = _vectors(call, segments, slots).view(*lead, call.embedding.shape[1])
    position_ids = torch.where(filled, segments.position[slots.segment] + slots.place, 0).view(lead)
    labels = nothing
    if call.labels is not None:
        labels = torch.where(slots.is_text, _of_tokens(call.labels, slots), -100).view(lead)

    own = torch.arange(rows, device=device) + call.prompt_segments
    start = (segments.first_slot + segments.begin + segments.prompt_length)[own]
    placed = real & (ranks < segments.text[own][:, None])
    token_slots = torch.where(placed, start[:, None] + ranks, -1)
    prompt_slots = torch.where(segments.prompt_length > 0, segments.first_slot + segments.begin, -1)
    row_ids = nothing
    if call.plan is not None:
        prompt_slots = prompt_slots[: call.prompt_segments]
        row_ids = segments.text_row.clamp(min=-1)[slots.segment]

    status = _status(call, segments, real, placed) if call.check else nothing
    mask = _mask(call, segments, filled, lead)
    return embeds, mask, position_ids, labels, token_slots, prompt_slots, row_ids, status


def _status(call: AssembleCall, segments: _Segments, real: Tensor, placed: Tensor) -> Tensor:
    rows, tokens = call.input_ids.shape
    device = call.input_ids.device
    token = torch.arange(rows * tokens, device=device).view(rows, tokens)
    bad_id = placed & ((call.input_ids < 0) | (call.input_ids >= len(call.embedding)))
    bad_mask = torch.zeros_like(real) if call.attention_mask is None else placed & (call.attention_mask != 1)
    return torch.stack(  # in the order of Status
        [
            _first(bad_id, token),
            _first(segments.bad_prompt, torch.arange(len(segments.bad_prompt), device=device)),
            _first(bad_mask, token),
            _first(segments.bad_length, segments.text_row.clamp(min=0)),
            _first(segments.bad_offset, segments.prompt),
        ]
    )


def _segments(call: AssembleCall, real_tokens: Tensor) -> _Segments:
    """The segments of the output, from the number of real tokens of each row."""
    rows, device = len(call.input_ids), call.input_ids.device
    count = call.prompt_offsets.numel() - 1
    no_rows = call.input_ids.new_zeros(rows, dtype=torch.int64)
    if call.plan is None:
        text_row, position = torch.arange(rows, device=device), no_rows
        first_slot, length = text_row * call.width, no_rows + call.width
        prompt = call.prompt_ids if call.prompt_ids is not None else no_rows + (0 if count > 0 else -1)
        text_prompt = prompt
    else:
        first_slot, length, text_prompt, position = call.plan.unbind(1)  # in the order of PlanColumn
        prompt = text_prompt.clone()
        prompt[call.prompt_segments :] = -1
        text_row = torch.arange(len(call.plan), device=device) - call.prompt_segments
    known = (prompt >= 0) & (prompt < count)
    offsets = F.pad(call.prompt_offsets, (0, 1))
    safe = torch.where(known, prompt, 0)
    prompt_row, prompt_end = offsets[safe], offsets[safe + 1]
    bad_offset = known & ((prompt_row < 0) | (prompt_end < prompt_row) | (prompt_end > len(call.prompts)))
    prompt_length = torch.where(known & ~bad_offset, prompt_end - prompt_row, 0)

    text = torch.where(text_row >= 0, real_tokens[text_row.clamp(min=0)] if rows else 0, 0)
    bad_length = (prompt_length > length) | (text > length - prompt_length)
    prompt_length = torch.where(prompt_length > length, 0, prompt_length)
    if call.plan is not None:
        bad_length = bad_length | (prompt_length + text != length)
    text = torch.minimum(text, length - prompt_length)
    begin = length - prompt_length - text if call.left and call.plan is None else torch.zeros_like(length)
    bad_prompt = ~known & (prompt != -1)
    return _Segments(
        first_slot,
        begin,
        prompt,
        prompt_row,
        prompt_length,
        text_row,
        text_prompt,
        text,
        position,
        length,
        bad_prompt,
        bad_offset,
        bad_length,
    )


def _slots(call: AssembleCall, segments: _Segments, real: Tensor, ranks: Tensor) -> _Slots:
    """The contents of each output slot."""
    rows, tokens = call.input_ids.shape
    device = call.input_ids.device
    slot = torch.arange(call.slots, device=device)
    if call.plan is None:
        segment = slot // max(call.width, 1)
    else:
        segment = torch.repeat_interleave(segments.length, output_size=call.slots)
    place = slot - segments.first_slot[segment] - segments.begin[segment]
    is_prompt = (place >= 0) & (place < segments.prompt_length[segment])
    rank = place - segments.prompt_length[segment]
    is_text = (rank >= 0) & (rank < segments.text[segment])
    columns = call.input_ids.new_zeros((rows, tokens + 1), dtype=torch.int64)  # of the token with each rank
    columns = columns.scatter(1, torch.where(real, ranks, tokens), torch.arange(tokens, device=device).expand(rows, -1))
    row = torch.where(is_text, segments.text_row[segment], 0)
    column = columns[row, torch.where(is_text, rank, 0)] if rows else slot
    return _Slots(segment, place, rank, is_prompt, is_text, row, column)


def _of_tokens(values: Tensor, slots: _Slots) -> Tensor:
    """[slots]: the values [B, T] of the tokens in them; anything elsewhere."""
    return values[slots.row, slots.column] if values.numel() else values.new_zeros(len(slots.row))


def _vectors(call: AssembleCall, segments: _Segments, slots: _Slots) -> Tensor:
    """[slots, D]"""
    embedding, prompts, update = call.embedding, call.prompts, call.token_update
    token_ids = _of_tokens(call.input_ids, slots).long()
    is_token = slots.is_text & (token_ids >= 0) & (token_ids < len(embedding))
    vectors = embedding.new_zeros((call.slots, embedding.shape[1]))
    if len(embedding):
        token_vectors = F.embedding(torch.where(is_token, token_ids, 0), embedding)
        vectors = token_vectors * call.scale if call.scale != 1.0 else token_vectors
        if update is not None and update.numel():
            count, reach, _ = update.shape
            prompt = segments.text_prompt[slots.segment]
            updated = slots.is_text & (prompt >= 0) & (prompt < count) & (slots.rank < reach)
            added = F.embedding(torch.where(updated, prompt * reach + slots.rank, 0), update.flatten(0, 1))
            wide = token_vectors.to(update.dtype) * call.scale + added
            vectors = torch.where(updated[:, None], wide.to(embedding.dtype), vectors)
        vectors = torch.where(is_token[:, None], vectors, 0)
    if len(prompts):
        prompt_row = torch.where(slots.is_prompt, segments.prompt_row[slots.segment] + slots.place, 0)
        vectors = torch.where(slots.is_prompt[:, None], F.embedding(prompt_row, prompts).to(embedding.dtype), vectors)
    return vectors


def _mask(call: AssembleCall, segments: _Segments, filled: Tensor, lead: tuple[int, int]) -> Tensor:
    if call.mask_format == MaskFormat.NONE:
        return call.input_ids.new_empty(0, dtype=torch.int64)
    if call.mask_format == MaskFormat.TWO_D:
        return filled.to(torch.int64 if call.attention_mask is None else call.attention_mask.dtype).view(lead)
    end = segments.begin + segments.prompt_length + segments.text
    visible = _visible(segments.begin, end, call.width, call.causal, call.window)
    if call.mask_format == MaskFormat.FOUR_D_BOOL:
        return visible
    dtype = call.embedding.dtype
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=filled.device)
    return torch.where(visible, torch.zeros_like(hidden), hidden)


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
