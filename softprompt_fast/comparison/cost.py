"""The cost of a prediction: tokens in front of a row, and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Cost:
    """Means over rows."""

    text_tokens: float
    prefix_tokens: float
    """Tokens that the method puts in front of every row's text."""
    flops: float
    """Operations of a forward pass over prefix and text, for one row alone and without a cache."""
    flops_cached: float
    """The same if the prefix's keys and values are cached between rows."""


def cost(model: Any, text_tokens: Sequence[int], prefix_tokens: float, *, uses_head: bool = True) -> Cost:
    """Counts two operations per matrix weight and token, and the products in attention, but no normalisations.

    In a mixture of experts, all experts are counted. That is more than run.
    """
    matrices, head = matrix_weights(model)
    head = head if uses_head else 0
    width = attention_width(model)
    alone = cached = 0.0
    for tokens in text_tokens:
        total = tokens + prefix_tokens
        alone += 2.0 * matrices * total + 2.0 * width * total * total + 2.0 * head
        cached += 2.0 * matrices * tokens + 2.0 * width * (total * total - prefix_tokens**2) + 2.0 * head
    rows = max(1, len(text_tokens))
    return Cost(sum(text_tokens) / rows, prefix_tokens, alone / rows, cached / rows)


def matrix_weights(model: Any) -> tuple[int, int]:
    """Weights that run for every token, and the head's weights, which run for the last token only."""
    embeddings = {id(model.get_input_embeddings().weight)}
    output = model.get_output_embeddings()
    head = 0
    if output is not None:
        embeddings.add(id(output.weight))
        head = output.weight.numel()
    own = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
    return own, head


def attention_width(model: Any) -> int:
    """Layers times heads times their size: a causal row of n tokens costs 2 n^2 operations for each of these."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers = getattr(config, "num_hidden_layers", 0) or 0
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or 0) // max(heads, 1)
    return int(layers * heads * size)
