"""Tensors for grouped attention with a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors(key_heads: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of 6 heads, 5 keys, values of another size, and an additive mask."""
    mask = torch.zeros(2, 1, queries, 5).masked_fill_(torch.rand(2, 1, queries, 5) < 0.4, -1e9)
    return torch.randn(2, 6, queries, 8), torch.randn(2, key_heads, 5, 8), torch.randn(2, key_heads, 5, 4), mask
