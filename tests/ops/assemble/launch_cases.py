"""On a pretended GPU. :mod:`test_launches` runs this file in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pretended_gpu import OnGpu, pretended_gpu

import softprompt_fast as spf
from softprompt_fast.ops.extension.contract import FEW_INTEGERS

FEW, MANY = FEW_INTEGERS, FEW_INTEGERS + 1


def launches(rows: int, offsets: Any, prompt_ids: Any, *, grad: bool = False, **options: Any) -> list[str]:
    ids, mask = torch.zeros(rows, 3, dtype=torch.long), torch.ones(rows, 3, dtype=torch.long)
    embedding, prompts = OnGpu(torch.ones(4, 8)), OnGpu(torch.ones(int(offsets[-1]), 8).requires_grad_(grad))
    given = OnGpu(ids), embedding, prompts, offsets, prompt_ids, OnGpu(mask), OnGpu(ids)
    with pretended_gpu() as launched:
        batch = spf.assemble(*given, **options)
    assert batch.status is None
    return list(launched)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "offsets, prompt_ids",
    [([0, 5], None), ([0, 2, 5], [1, -1]), (torch.tensor([0, 2, 5]), torch.tensor([1, 0], dtype=torch.int32))],
    ids=["one prompt", "lists", "tensors on the host"],
)
def test_a_padded_batch_is_one_launch(offsets: Any, prompt_ids: Any, grad: bool) -> None:
    assert launches(2, offsets, prompt_ids, grad=grad, max_prompt_length=5) == ["assemble"]


def test_a_packed_batch_copies_its_plan_only() -> None:
    found = launches(2, [0, 2, 5], [1, 0], grad=True, layout="packed", lengths=[3, 3])
    assert found == ["_to_copy", "assemble"]


def test_what_is_not_few_is_copied() -> None:
    assert launches(FEW, [0, 5], [0] * FEW, max_prompt_length=5) == ["assemble"]
    assert launches(MANY, [0, 5], [0] * MANY, max_prompt_length=5) == ["_to_copy", "assemble"]
    offsets = list(range(MANY))
    assert launches(2, offsets, [0, 1], max_prompt_length=5) == ["_to_copy", "assemble"]


def test_values_that_are_checked_cost_a_read() -> None:
    ids, prompts = OnGpu(torch.zeros(2, 3, dtype=torch.long)), OnGpu(torch.ones(5, 8))
    with pretended_gpu(may_wait=True):
        batch = spf.assemble(ids, OnGpu(torch.ones(4, 8)), prompts, [0, 5], check=True)
    assert batch.status is not None
