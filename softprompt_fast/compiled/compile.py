"""Compiled prompts: a prompt's keys and values in every layer, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..hf.architecture import check_room
from ..hf.embedding import token_vectors, vectors_like
from ..packed.batch import PackedInputs
from ..packed.layout import PackedLayout, RowGroup
from ..packed.runner import PackedRunner


def slot_shape(model: Any) -> tuple[int, int, int, int]:
    """(L, 2, H', E) of one virtual token.

    Raises:
        Unsupported: the configuration has other sizes in other layers. If only layers differ, running them raises it.
    """
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except Exception as error:  # transformers' own class of error, which its first releases do not have
        raise Unsupported("the sizes of its keys and values differ between layers") from error
    return (config.num_hidden_layers, 2, heads, size)


def layered(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Keys and values of virtual tokens as PEFT stores them, [P, L * 2 * H' * E] -> [L, 2, P, H', E]."""
    layers, two, heads, size = shape
    return values.view(-1, layers, two, heads, size).permute(1, 2, 0, 3, 4)


def flattened(compiled: Tensor) -> Tensor:
    """[L, 2, P, H', E] -> [P, L * 2 * H' * E], as PEFT stores prefixes."""
    return compiled.permute(2, 0, 1, 3, 4).flatten(1)


@torch.no_grad()
def compile_prompts(runner: PackedRunner, prompts: Sequence[Tensor], first: int = 0) -> Tensor:
    """Keys and values of prompts [P_n, D], computed in one run of the model.

    Args:
        first: position of a prompt's first vector. A model with relative positions allows a negative one too.

    Returns:
        [L, 2, sum of P_n, H', E] in the model's dtype.

    Raises:
        Unsupported: the model cannot run the packed layout.
    """
    model = runner.model
    weight = vectors_like(model.get_input_embeddings())
    lengths = [len(prompt) for prompt in prompts]
    count, device = sum(lengths), weight.device
    layers, two, heads, size = slot_shape(model)
    check_room(lengths, [0] * len(lengths), runner.context_length)
    capture = torch.empty(layers, two, count, heads, size, dtype=weight.dtype, device=device)
    layout = PackedLayout(
        prompts=RowGroup.of(0, lengths, [(0, 0)] * len(lengths), device),
        rows=RowGroup.of(count, [], [], device),
        capture=capture,
    )
    vectors = torch.cat(list(prompts)).to(device=device, dtype=weight.dtype)
    positions = torch.cat([torch.arange(first, first + n) for n in lengths]).to(device)
    runner.run(PackedInputs(vectors[None], positions[None], layout), positions.new_zeros(1), {})
    return capture


def pack_texts(
    model: Any, texts: Sequence[Sequence[int]], prefixes: Sequence[tuple[int, int]], compiled: Tensor
) -> PackedInputs:
    """Packs texts that follow compiled prompts. Prompts neither run nor are copied.

    Args:
        texts: token ids of each row.
        prefixes: first slot and length of each row's prompt in ``compiled``; (0, 0): none.
        compiled: [L, 2, R, H', E]
    """
    embedding = model.get_input_embeddings()
    device = vectors_like(embedding).device
    flat = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    positions = torch.tensor(
        [virtual + t for text, (_, virtual) in zip(texts, prefixes, strict=True) for t in range(len(text))],
        dtype=torch.int64,
    )
    layout = PackedLayout(
        prompts=RowGroup.of(0, [], [], device),
        rows=RowGroup.of(0, [len(text) for text in texts], prefixes, device),
        compiled=compiled,
    )
    vectors = token_vectors(embedding, flat.to(device))
    return PackedInputs(vectors[None], positions.to(device)[None], layout)
