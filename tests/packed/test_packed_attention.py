"""Attention over the packed layout where the native kernel does not run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from softprompt_fast.packed.attention import heads_for_sdpa


@pytest.mark.parametrize(
    ("device", "heads", "masked", "expected", "options"),
    [
        ("cuda", 2, True, 6, {}),
        ("cuda", 2, False, 2, {"enable_gqa": True}),
        ("cuda", 6, True, 6, {}),
        ("cpu", 2, True, 2, {"enable_gqa": True}),
    ],
)
def test_keys_are_repeated_where_a_fused_kernel_needs_it(
    device: str, heads: int, masked: bool, expected: int, options: dict[str, bool]
) -> None:
    with FakeTensorMode():  # no GPU is needed
        query, key = torch.empty(1, 6, 3, 8, device=device), torch.empty(1, heads, 5, 8, device=device)
        keys, values, given = heads_for_sdpa(query, key, key, masked)
    assert keys.shape[1] == values.shape[1] == expected and given == options
