"""Attention over the packed layout where the native kernel does not run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import tensors

from softprompt_fast.packed.attention import masked_attention


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
