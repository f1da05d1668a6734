"""The native ``assemble`` against its twin in plain PyTorch, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Case, assert_same, cases, poisoned, raw_arguments, same_bits, threads

from softprompt_fast import _library, reference
from softprompt_fast._checks import FLOATS, LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_twin(native: _library.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=250)
    @given(cases(dtypes=(dtype,), layouts=(layout,)))
    def check(case: Case) -> None:
        assert_same(case.run(native), case.run(None))

    check()


@st.composite
def broken(draw: Callable[..., Any]) -> tuple[Any, ...]:
    """Arguments of the raw op that break one or more of its rules."""
    case: Case = draw(cases(max_tokens=5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    args = list(raw_arguments(case))

    def spoil(values: torch.Tensor, *wrong: float) -> torch.Tensor:
        at = torch.randint(3, values.shape, generator=random) == 0
        choice = torch.tensor(wrong, dtype=torch.float64)[torch.randint(len(wrong), values.shape, generator=random)]
        return torch.where(at, choice.to(values.dtype), values)

    input_ids, prompt_offsets, prompt_ids, mask, plan = (args[i] for i in (0, 3, 4, 5, 7))
    vocabulary, rows, count = len(args[1]), len(args[2]), prompt_offsets.numel() - 1
    for rule in draw(st.sets(st.sampled_from(["id", "offset", "prompt", "mask", "length"]), min_size=1)):
        if rule == "id":
            args[0] = spoil(input_ids, -1, vocabulary, 2**31 - 1)
        elif rule == "offset":
            args[3] = spoil(prompt_offsets, -1, rows + 1, 1, 2**40)
        elif rule == "prompt" and plan is None and prompt_ids is not None:
            args[4] = spoil(prompt_ids, -2, count, 2**40)
        elif rule == "prompt" and plan is not None:
            args[7] = torch.cat([plan[:, :2], spoil(plan[:, 2:3], -2, count), plan[:, 3:]], 1)
        elif rule == "mask" and mask is not None:
            args[5] = spoil(mask, *((2, 0.5, float("nan"), -float("inf")) if mask.dtype.is_floating_point else (2, -1)))
        elif rule == "length" and plan is None and args[9] > 0:  # a width that does not hold every row
            args[9] -= draw(st.integers(1, args[9]))
            args[8] = input_ids.shape[0] * args[9]
        elif rule == "length" and mask is not None:  # a plan that counts other tokens
            args[5] = spoil(mask, 0, 1)
    return tuple(args)


@settings(max_examples=600)
@given(broken())
def test_equals_the_twin_for_input_that_breaks_the_rules(native: _library.Ops, arguments: tuple[Any, ...]) -> None:
    with poisoned():
        for ours, twin in zip(native.assemble(*arguments), reference.assemble(*arguments), strict=True):
            assert same_bits(ours, twin), f"{ours}\n{twin}"


@settings(max_examples=40)
@given(cases(max_rows=9, max_tokens=60, prompt_lengths=(20, 3, 50), dims=(1000, 2048, 1001)), st.integers(1, 5))
def test_equals_the_twin_on_several_threads(native: _library.Ops, case: Case, count: int) -> None:
    twin = case.run(None)
    with threads(count):
        assert_same(case.run(native), twin)


@pytest.mark.parametrize("dim", [1024, 1000, 1001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_twin_beyond_the_caches(native: _library.Ops, layout: str, dim: int) -> None:
    rows, tokens = 48, 256
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1))
    options = {"layout": layout, "padding_side": "left", "mask_format": "4d_additive"}
    case = Case(
        torch.randint(500, (rows, tokens)),
        torch.randn(500, dim),
        torch.randn(30, dim),
        [0, 20, 30],
        [row % 3 - 1 for row in range(rows)],
        torch.arange(tokens) < lengths,
        torch.randint(500, (rows, tokens)),
        options,
    )
    assert_same(case.run(native), case.run(None))
