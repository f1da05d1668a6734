"""The sizes of the output, and the plan of the packed layout, from numbers that are known on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_lengths
from .integers import host_integers


class Segments(NamedTuple):
    """The packed layout: G distinct prompts, then the texts of B rows."""

    plan: Tensor
    """[G + B + 1, 4] int64 on the device, with the columns of ``PlanColumn``; the last line closes the layout."""
    lengths: list[int]
    """[G + B]"""
    prompts: list[int]
    """[G]: the distinct prompts."""
    row_prompts: list[int]
    """[B]: each row's place in ``prompts``, -1 for none."""

    @property
    def text_lengths(self) -> list[int]:
        return self.lengths[len(self.prompts) :]


class Sizes(NamedTuple):
    slots: int
    """Vectors of the output: B * S padded, K packed."""
    width: int
    """S padded; the longest segment packed."""
    segments: Segments | None
    """None: padded layout."""


def padded_sizes(
    rows: int,
    tokens: int,
    count: int,
    offsets: list[int] | None,
    ids: list[int] | None,
    prompt_rows: int,
    max_prompt_length: int | None,
) -> Sizes:
    width = max_prompt_length
    if width is None:
        width = _longest_prompt(count, offsets, ids, prompt_rows)
    width += tokens
    return Sizes(rows * width, width, None)


def _longest_prompt(count: int, offsets: list[int] | None, ids: list[int] | None, prompt_rows: int) -> int:
    """Length of the longest prompt that the batch uses; of all prompts if ``ids`` are not known here."""
    if count <= 0:
        return 0
    if count == 1 and (ids is None or 0 in ids):
        return prompt_rows
    if offsets is None:
        raise ValueError(
            "assemble: `max_prompt_length` must be given under torch.compile if `prompt_offsets` is a tensor of "
            "several prompts (or give the offsets as a list)"
        )
    used = range(count) if ids is None else {n for n in ids if n >= 0}
    return max([0, *[offsets[n + 1] - offsets[n] for n in used]])


def packed_sizes(
    offsets: list[int] | None,
    ids: list[int] | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
) -> Sizes:
    """Each distinct prompt once, in order of appearance, then every row's text."""
    if offsets is None or ids is None:
        raise ValueError("assemble: under torch.compile the packed layout needs prompt offsets and ids as lists")
    distinct = list(dict.fromkeys(n for n in ids if n >= 0))
    place = {n: g for g, n in enumerate(distinct)}
    size = {n: offsets[n + 1] - offsets[n] for n in distinct}
    lines, slot = [], 0  # in the order of PlanColumn
    for n in distinct:
        lines.append((slot, size[n], n, 0))
        slot += size[n]
    for n, length in zip(ids, _text_lengths(input_ids, attention_mask, lengths), strict=True):
        lines.append((slot, length, n, size.get(n, 0)))
        slot += length
    segment_lengths = [line[1] for line in lines]
    lines.append((slot, 0, -1, 0))
    plan = torch.tensor(lines, dtype=torch.int64)
    if input_ids.device.type == "cuda":
        plan = plan.pin_memory()
    plan = plan.to(input_ids.device, non_blocking=True)
    segments = Segments(plan, segment_lengths, distinct, [place.get(n, -1) for n in ids])
    return Sizes(slot, max(segment_lengths, default=0), segments)


def _text_lengths(
    input_ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | Sequence[int] | None
) -> list[int]:
    """[B]: the number of real tokens of each row. Waits for a GPU unless ``lengths`` are given."""
    rows, tokens = input_ids.shape
    if lengths is not None:
        given = host_integers(lengths, "lengths")
        check_lengths(given, rows, tokens)
        return given
    return [tokens] * rows if attention_mask is None else (attention_mask != 0).sum(1).tolist()
