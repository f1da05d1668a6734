"""Variable-length attention in plain PyTorch with the contract of the GPU libraries: a CPU tests all around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from softprompt_fast.ops.segment_attention import functional, varlen
from softprompt_fast.ops.segment_attention.ragged import RaggedPlan

NAME = "stand-in"


def stand_in(query: Tensor, key: Tensor, value: Tensor, plan: RaggedPlan, scale: float, window: int) -> Tensor:
    """Causal, aligned at the bottom right: the last query of a segment sees its last key."""
    parts = []
    queries, keys = plan.cu_queries.tolist(), plan.cu_keys.tolist()
    assert queries[-1] == len(query) and keys[-1] <= len(key) == len(value)
    for at, end, key_at, key_end in zip(queries, queries[1:], keys, keys[1:], strict=False):
        asked, held = end - at, key_end - key_at
        assert asked <= plan.max_queries and held <= plan.max_keys
        groups = query.shape[1] // key.shape[1]
        k, v = (x[key_at:key_end].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        distance = torch.arange(asked)[:, None] + held - asked - torch.arange(held)
        seen = (distance >= 0) & ((distance < window) if window else True)
        scores = (query[at:end].transpose(0, 1) @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@contextmanager
def path_of_a_gpu() -> Iterator[list[str]]:
    """Packed batches take the path of a GPU; the list gets an entry per call."""
    calls: list[str] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(NAME)
        return stand_in(*arguments)

    with (
        mock.patch.object(functional, "available", lambda query: False),
        mock.patch.object(varlen, "libraries", lambda *tensors: [NAME]),
        mock.patch.dict(varlen.LIBRARIES, {NAME: counted}),
    ):
        yield calls
