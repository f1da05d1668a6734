"""The CUDA kernels' thread code, played on a CPU, against the twin: bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support.op_cases import (
    Case,
    assert_same,
    assert_same_outputs,
    bit_patterns,
    broken,
    cases,
    expected_gradients,
    gradients,
    prompt_without_room,
    same_bits,
)

from softprompt_fast.ops.assemble.checks import FLOATS, LAYOUTS
from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.extension.contract import FEW_INTEGERS, AssembleCall

# Of every vector width, and beyond what one turn of a block's threads covers.
DIMS = (7, 1, 2, 4, 8, 16, 33, 64, 264, 520)


def test_barriers_are_honoured(emulated: backend.Ops) -> None:
    for _ in range(3):  # threads run in another order each time
        out = torch.zeros(32, dtype=torch.int64)
        torch.ops.softprompt_fast_emulated.reverse(out)
        assert out.tolist() == list(reversed(range(32)))


def test_a_divergent_barrier_is_an_error(emulated: backend.Ops) -> None:
    with pytest.raises(RuntimeError, match="divergent barrier"):
        torch.ops.softprompt_fast_emulated.diverge()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_twin(emulated: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=50)
    @given(cases(dtypes=(dtype,), layouts=(layout,), max_tokens=40, prompt_lengths=(20, 3, 50, 0), dims=DIMS))
    def check(case: Case) -> None:
        assert_same(case.run(emulated), case.run(None))

    check()


@settings(max_examples=200)
@given(broken())
def test_equals_the_twin_for_input_that_breaks_the_rules(emulated: backend.Ops, call: AssembleCall) -> None:
    assert_same_outputs(emulated, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_converts_every_bit_pattern_as_the_twin(emulated: backend.Ops, dtype: torch.dtype) -> None:
    case = bit_patterns(dtype)
    assert_same(case.run(emulated), case.run(None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [torch.bool, torch.float64], ids=str)
def test_rows_longer_than_a_tile(emulated: backend.Ops, mask: torch.dtype, layout: str) -> None:
    """Long masks over short vectors make the largest tiles. A thread has more tokens than it remembers, 64."""
    rows, tokens = 3, 4500
    real = torch.rand(rows, tokens) < 0.7
    options = {"layout": layout, "padding_side": "left", "mask_format": "2d"}
    ids, embedding, prompts = torch.randint(9, (rows, tokens)), torch.randn(9, 2), torch.randn(40, 2)
    factors = torch.randn(2, 1500, 1), torch.randn(2, 1, 2)
    case = Case(ids, embedding, prompts, [0, 30, 40], [1, -1, 0], real.to(mask), None, options, factors)
    assert_same(case.run(emulated), case.run(None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_prompts_and_rows_than_travel_with_the_arguments(emulated: backend.Ops, layout: str) -> None:
    rows = FEW_INTEGERS + 9
    offsets = [*range(rows), rows + 2]
    prompt_ids = [row * 7 % (rows + 1) - 1 for row in range(rows)]
    ids, embedding, prompts = torch.randint(9, (rows, 3)), torch.randn(9, 4), torch.randn(offsets[-1], 4)
    case = Case(ids, embedding, prompts, offsets, prompt_ids, torch.rand(rows, 3) < 0.7, ids, {"layout": layout})
    assert_same(case.run(emulated), case.run(None))
    for ours, expected in zip(gradients(case, emulated), expected_gradients(case), strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_equal_their_definition(emulated: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=30)
    @given(cases(dtypes=(dtype,), layouts=(layout,), dims=DIMS, special=False))
    def check(case: Case) -> None:
        for ours, expected in zip(gradients(case, emulated), expected_gradients(case), strict=True):
            assert same_bits(ours, expected), f"{ours}\n{expected}"

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_found_no_room_gets_no_gradient(emulated: backend.Ops, layout: str) -> None:
    case = prompt_without_room(layout)
    for ours, expected in zip(gradients(case, emulated), expected_gradients(case), strict=True):
        assert same_bits(ours, expected)


@settings(max_examples=60)
@given(cases(dtypes=(torch.float32,), dims=DIMS, special=False))
def test_gradients_equal_the_twins(emulated: backend.Ops, case: Case) -> None:
    for ours, twin in zip(gradients(case, emulated), gradients(case, None), strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6 * float(twin.abs().max()) if twin.numel() else 0)
