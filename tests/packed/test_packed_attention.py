"""Attention over the packed layout where the native kernel does not run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.pretended_gpu import OnGpu, pretended_gpu
from torch import Tensor

from softprompt_fast.packed.attention import masked_attention


def tensors(key_heads: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of 6 heads, 5 keys, values of another size, and an additive mask."""
    mask = torch.zeros(2, 1, queries, 5).masked_fill_(torch.rand(2, 1, queries, 5) < 0.4, -1e9)
    return torch.randn(2, 6, queries, 8), torch.randn(2, key_heads, 5, 8), torch.randn(2, key_heads, 5, 4), mask


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("key_heads", [6, 2, 1])
def test_heads_share_keys(key_heads: int, queries: int) -> None:
    query, key, value, mask = tensors(key_heads, queries)
    repeated = [x.repeat_interleave(6 // key_heads, 1) for x in (key, value)]
    expected = ((query @ repeated[0].transpose(2, 3)) * 0.3 + mask).softmax(-1) @ repeated[1]
    torch.testing.assert_close(masked_attention(query, key, value, mask, 0.3), expected)
    if queries == 3:
        causal = F.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.3)
        torch.testing.assert_close(masked_attention(query, key, value, None, 0.3), causal)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_on_a_gpu_a_mask_meets_as_many_heads_of_keys_as_of_queries(key_heads: int, queries: int) -> None:
    """Else PyTorch keeps all scores in memory."""
    calls: list[tuple[int, int, bool]] = []
    attention = F.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[1], key.shape[1], options["enable_gqa"]))
        return attention(query, key, value, **options)

    given = tensors(key_heads, queries)
    with pretended_gpu(), mock.patch.object(F, "scaled_dot_product_attention", recorded):
        found = masked_attention(*(OnGpu(x) for x in given), 0.3)
    assert isinstance(found, OnGpu)
    torch.testing.assert_close(found.held, masked_attention(*given, 0.3))
    ((query_heads, heads_of_keys, grouped),) = calls
    assert query_heads == heads_of_keys and not grouped
