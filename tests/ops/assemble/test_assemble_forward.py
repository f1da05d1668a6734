"""The native ``assemble`` against its twin in plain PyTorch, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import (
    Case,
    assert_same,
    assert_same_outputs,
    bit_patterns,
    broken,
    cases,
    op_call,
    same_bits,
    threads,
)

from softprompt_fast.ops.assemble.checks import FLOATS, LAYOUTS
from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.extension.contract import AssembleCall


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_twin(native: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=250)
    @given(cases(dtypes=(dtype,), layouts=(layout,)))
    def check(case: Case) -> None:
        assert_same(case.run(native), case.run(None))

    check()


@settings(max_examples=600)
@given(broken())
def test_equals_the_twin_for_input_that_breaks_the_rules(native: backend.Ops, call: AssembleCall) -> None:
    assert_same_outputs(native, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_converts_every_bit_pattern_as_the_twin(native: backend.Ops, dtype: torch.dtype) -> None:
    case = bit_patterns(dtype)
    assert_same(case.run(native), case.run(None))


@settings(max_examples=40)
@given(cases(max_rows=9, max_tokens=60, prompt_lengths=(20, 3, 50), dims=(1000, 2048, 1001)), st.integers(1, 5))
def test_equals_the_twin_on_several_threads(native: backend.Ops, case: Case, count: int) -> None:
    twin = case.run(None)
    with threads(count):
        assert_same(case.run(native), twin)


@pytest.mark.parametrize("dim", [1024, 1000, 1001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_twin_beyond_the_caches(native: backend.Ops, layout: str, dim: int) -> None:
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
        (torch.randn(2, 200, 4), torch.randn(2, 4, dim)),
    )
    assert_same(case.run(native), case.run(None))


def test_calls_from_several_threads(native: backend.Ops) -> None:
    rows, dim = 5, 3000
    ids, embedding, prompts = torch.randint(9, (rows, 40)), torch.randn(9, dim), torch.randn(7, dim)
    case = Case(ids, embedding, prompts, [0, 7], None, None, ids, {"padding_side": "left"})
    expected = case.run(native)
    call = op_call(case)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: native.assemble(*call), range(40)):
            assert same_bits(results[0], expected.inputs_embeds) and same_bits(results[3], expected.labels)
