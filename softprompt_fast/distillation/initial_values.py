"""Initial values of a compressed text, made from the text's own vectors, keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compiled.compile import compile_prompts, flattened
from ..hf.embedding import embedding_table
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..packed.runner import PackedRunner

PROBE = 32
"""Tokens that show whether a model's positions are relative."""
PROBE_DISTANCE = 512
MOVED = 0.1
"""Largest relative change of values when all positions move. Rounding in bfloat16 stays below."""


def spread_places(length: int, count: int) -> list[int]:
    """`count` places of a text, spread evenly, the first of them first."""
    return torch.linspace(0, length - 1, count, dtype=torch.float32).round().long().tolist() if count > 1 else [0]


@torch.no_grad()
def values_from_text(student: SoftPromptModel, text_ids: Sequence[int], count: int, init: str) -> Tensor:
    """Initial values [N, D] or, of keys and values, [N, W], of `count` positions.

    Args:
        text_ids: [T]
        init: one of:

            * "text": the text's first tokens.
            * "sampled": tokens spread over the text; keys and values as they are in the whole text, with the keys at
              their distance from the row's first token if the model has relative positions.
            * "pooled": the mean vector of each of N parts of the text.
    """
    table = embedding_table(student.get_input_embeddings())
    vectors = table(torch.tensor(list(text_ids), device=table.weight.device)).float()
    deep = student.runner if isinstance(student, DeepPromptModel) else None
    if init == "pooled":
        parts = torch.stack([part.mean(0) for part in vectors.tensor_split(count)])
        return parts if deep is None else flattened(compile_prompts(deep, [parts])).float()
    places = spread_places(len(vectors), count) if init == "sampled" else list(range(count))
    if deep is None:
        return vectors[places]
    first = first_before(deep, vectors, count) if init == "sampled" else 0
    return flattened(compile_prompts(deep, [vectors], first)).float()[places]


@torch.no_grad()
def first_before(runner: PackedRunner, vectors: Tensor, count: int) -> int:
    """The position of a text's first token from which its keys keep their distance to a row after `count` positions.

    A row begins at position N, and after the whole text at T. If the model has relative positions, a text from N - T on
    ends where the row begins. Other models know no position before 0.

    Args:
        vectors: [T, D], of the text.
    """
    moved = count - len(vectors)
    return moved if moved and _positions_are_relative(runner, vectors) else 0


def _positions_are_relative(runner: PackedRunner, vectors: Tensor) -> bool:
    """Whether a text gives the same values wherever it begins."""
    some, limit = vectors[:PROBE], runner.context_length
    far = PROBE_DISTANCE if limit is None else min(PROBE_DISTANCE, limit - len(some))
    if far <= 0:  # there is no place to move to
        return False
    near, there = (compile_prompts(runner, [some], first)[:, 1].float() for first in (0, far))
    return bool((near - there).norm() <= MOVED * near.norm())
