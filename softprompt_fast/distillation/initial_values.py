"""Initial values of a compressed text, made from the text's own vectors, keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compiled.compile import compile_prompts, flattened
from ..hf.embedding import embedding_table
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel


def spread_places(length: int, count: int) -> list[int]:
    """`count` places of a text, spread evenly, the first of them first."""
    return torch.linspace(0, length - 1, count).round().long().tolist() if count > 1 else [0]


@torch.no_grad()
def values_from_text(student: SoftPromptModel, text_ids: Sequence[int], count: int, init: str) -> Tensor:
    """Initial values [N, D] or, of keys and values, [N, W], of `count` positions.

    Args:
        text_ids: [T]
        init: one of:

            * "text": the text's first tokens.
            * "sampled": tokens spread over the text; keys and values as they are in the whole text.
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
    return flattened(compile_prompts(deep, [vectors])).float()[places]
