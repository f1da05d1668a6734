"""The CUDA kernels on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.devices import DEVICE, NEEDS_STREAMS, ON_GPU
from support.op_cases import (
    Case,
    assert_same,
    assert_same_outputs,
    broken,
    cases,
    expected_gradients,
    gradients,
    same_bits,
    using,
)
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.ops.assemble.checks import FLOATS, LAYOUTS
from softprompt_fast.ops.extension import backend, build
from softprompt_fast.ops.extension.contract import AssembleCall

pytestmark = ON_GPU
DIMS = (7, 1, 2, 4, 8, 16, 33, 64, 264, 2056)
OFFSETS, PROMPT_IDS = [0, 5, 8], [1, -1, 0, 1]


@pytest.fixture(scope="module")
def ops(native: backend.Ops) -> backend.Ops:
    """The native ops; where a toolkit is there, they must have their CUDA part."""
    if DEVICE == "cuda" and build.cuda_toolkit() is None:
        pytest.skip("no CUDA toolkit to compile the kernels")
    assert backend.ops_for(torch.device(DEVICE)) is native
    return native


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Batch:
    """A ragged batch on the GPU, the prompts it uses, and ``assemble`` of it."""

    def __init__(self, device: str = DEVICE, rows: int = 4, tokens: int = 33, dim: int = 40) -> None:
        self.input_ids = torch.randint(50, (rows, tokens), device=device)
        self.embedding = torch.randn(50, dim, device=device)
        self.prompts = torch.randn(8, dim, device=device, requires_grad=True)
        self.lengths = [tokens - 3 * row for row in range(rows)]
        lengths = torch.tensor(self.lengths, device=device)
        self.attention_mask = (torch.arange(tokens, device=device) < lengths[:, None]).long()

    def assemble(self, offsets: Any = OFFSETS, prompt_ids: Any = PROMPT_IDS, **options: Any) -> spf.PromptedBatch:
        return spf.assemble(
            self.input_ids, self.embedding, self.prompts, offsets, prompt_ids, self.attention_mask, **options
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_twin(ops: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=100)
    @given(cases(dtypes=(dtype,), layouts=(layout,), max_tokens=40, prompt_lengths=(20, 3, 50, 0), dims=DIMS))
    def check(case: Case) -> None:
        case = case.to(DEVICE)
        assert_same(case.run(ops), case.run(None))

    check()


@settings(max_examples=200)
@given(broken())
def test_equals_the_twin_for_input_that_breaks_the_rules(ops: backend.Ops, call: AssembleCall) -> None:
    on_gpu = AssembleCall(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in call))
    assert_same_outputs(ops, on_gpu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_twin_at_the_size_of_a_model(ops: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    rows, tokens, dim = 16, 1500, 4096
    options = {"layout": layout, "padding_side": "left", "mask_format": "4d_additive", "sliding_window": 700}
    real = torch.rand(rows, tokens) < 0.8
    ids, embedding, prompts = torch.randint(99, (rows, tokens)), torch.randn(99, dim).to(dtype), torch.randn(300, dim)
    prompt_ids = [row % 3 - 1 for row in range(rows)]
    factors = torch.randn(2, 1000, 8), torch.randn(2, 8, dim)
    case = Case(ids, embedding, prompts, [0, 100, 300], prompt_ids, real, ids, options, factors).to(DEVICE)
    assert_same(case.run(ops), case.run(None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_equal_their_definition(ops: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=50)
    @given(cases(dtypes=(dtype,), layouts=(layout,), dims=DIMS, special=False))
    def check(case: Case) -> None:
        case = case.to(DEVICE)
        for ours, expected in zip(gradients(case, ops), expected_gradients(case), strict=True):
            assert same_bits(ours.cpu(), expected), f"{ours}\n{expected}"

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_same_bits_on_every_run(ops: backend.Ops, layout: str) -> None:
    ids, embedding, prompts = torch.randint(9, (256, 64)), torch.randn(9, 1000).bfloat16(), torch.randn(40, 1000)
    prompt_ids = (torch.arange(256) % 3 - 1).tolist()
    factors = torch.randn(2, 50, 4), torch.randn(2, 4, 1000)
    case = Case(ids, embedding, prompts, [0, 30, 40], prompt_ids, None, None, {"layout": layout}, factors).to(DEVICE)
    first = gradients(case, ops)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(case, ops), strict=True))


def test_a_bad_id_is_reported(ops: backend.Ops) -> None:
    batch = Batch()
    batch.input_ids[2, 5] = 50
    with pytest.raises(IndexError, match="`input_ids` must be 0 to 49, got 50 at row 2, column 5"):
        batch.assemble()
    unchecked = batch.assemble(check=False)
    assert not unchecked.inputs_embeds.flatten(0, 1)[unchecked.token_slots[2, 5]].any()


@NEEDS_STREAMS
def test_padded_can_be_captured(ops: backend.Ops) -> None:
    """With everything on the GPU a graph replays the call on new values."""
    batch = Batch()
    offsets, prompt_ids = torch.tensor(OFFSETS, device=DEVICE), torch.tensor(PROMPT_IDS, device=DEVICE)

    def run() -> spf.PromptedBatch:
        return batch.assemble(offsets, prompt_ids, max_prompt_length=5, check=False, padding_side="left")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    for shift in (1, 2):
        batch.input_ids.copy_((batch.input_ids + shift) % 50)
        prompt_ids.copy_(prompt_ids.roll(shift))
        graph.replay()
        assert_same(captured, run())


def without_status(batch: spf.PromptedBatch) -> spf.PromptedBatch:
    """Only a call that checks its input has a status."""
    return dataclasses.replace(batch, status=None)


@NEEDS_STREAMS
@pytest.mark.parametrize("options", [{"layout": "packed"}, {"max_prompt_length": 5}], ids=LAYOUTS[::-1])
def test_never_waits_for_the_gpu(ops: backend.Ops, options: dict[str, Any]) -> None:
    """Given what it needs on the host: not in the forward pass, nor in the backward pass."""
    batch = Batch()
    if options.get("layout") == "packed":
        options = options | {"lengths": batch.lengths}
    factors = torch.randn(2, 9, 3, device=DEVICE, requires_grad=True), torch.randn(2, 3, 40, device=DEVICE)
    options = options | {"token_factors": factors}
    batch.assemble(**options).inputs_embeds.sum().backward()  # memory and libraries are ready after this
    expected = batch.assemble(**options, check=True)
    with no_synchronisation():
        torch.cuda._sleep(1_000_000_000)
        slept = torch.cuda.Event()
        slept.record()
        result = batch.assemble(**options)
        result.inputs_embeds.sum().backward()
        assert not slept.query()  # the debug mode does not see every wait
    assert_same(without_status(result), without_status(expected))


@NEEDS_STREAMS
def test_runs_on_the_current_stream(ops: backend.Ops) -> None:
    batch = Batch()
    expected = batch.assemble()
    ids = batch.input_ids.clone()
    batch.input_ids.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the ids before they are back
        batch.input_ids.copy_(ids)
        result = batch.assemble(max_prompt_length=5, check=False)
        result.inputs_embeds.sum().backward()
    stream.synchronize()
    assert_same(without_status(result), without_status(expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_device_of_its_inputs(ops: backend.Ops) -> None:
    batch = Batch("cuda:1")
    result = batch.assemble()  # while cuda:0 is the current device
    (grad,) = torch.autograd.grad(result.inputs_embeds.sum(), batch.prompts)
    assert grad.device == result.inputs_embeds.device == torch.device("cuda:1")
    with using(None):
        assert_same(result, batch.assemble())
