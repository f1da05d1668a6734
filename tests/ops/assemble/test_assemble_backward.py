"""Gradients of ``assemble``: against numeric ones, the twin's autograd, and their definition bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given, settings
from support.op_cases import (
    Case,
    cases,
    expected_gradients,
    gradients,
    output_gradient,
    prompt_without_room,
    same_bits,
    threads,
    using,
)
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.ops.assemble.checks import FLOATS, LAYOUTS
from softprompt_fast.ops.extension import backend


@settings(max_examples=40)
@given(cases(dtypes=(torch.float64,), max_rows=3, max_tokens=4, prompt_lengths=(2, 1, 0), dims=(3, 1), special=False))
def test_gradcheck(backend_name: str, case: Case) -> None:
    prompts, embedding = (
        values.double().clone(memory_format=torch.contiguous_format).requires_grad_()
        for values in (case.prompts, case.embedding)
    )

    inputs: tuple[Tensor, ...] = (prompts, embedding)
    if case.token_factors is not None:
        inputs += tuple(x.double().contiguous().clone().requires_grad_() for x in case.token_factors)

    def vectors(prompts: Tensor, embedding: Tensor, *factors: Tensor) -> Tensor:
        case.prompts, case.embedding, case.token_factors = prompts, embedding, factors or None  # type: ignore[assignment]
        return case.run(backend.native_ops()).inputs_embeds

    assume(case.input_ids.numel() > 0)
    with using(backend.native_ops()):
        assert torch.autograd.gradcheck(vectors, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=150)
@given(case=cases(dtypes=(torch.float32,), special=False))
def test_equal_the_twins_autograd(native: backend.Ops, layout: str, case: Case) -> None:
    case.options["layout"] = layout
    for ours, twin in zip(gradients(case, native), gradients(case, None), strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6 * float(twin.abs().max()) if twin.numel() else 0)


@settings(max_examples=100)
@given(case=cases(dtypes=(torch.float32, torch.float64), special=False))
def test_of_token_factors_equal_the_twins_autograd(native: backend.Ops, case: Case) -> None:
    update = case.token_update()
    assume(update is not None and update.numel() > 0)
    grad, found = output_gradient(case), []
    for ops in (native, None):
        factors = tuple(factor.detach().requires_grad_() for factor in case.token_factors or ())
        with using(ops):
            embeds = replace(case, token_factors=factors).run(ops).inputs_embeds
            found.append(torch.autograd.grad(embeds, factors, grad))
    for ours, twin in zip(*found, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max()) if twin.numel() else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_their_definition(native: backend.Ops, dtype: torch.dtype, layout: str) -> None:
    @settings(max_examples=60)
    @given(cases(dtypes=(dtype,), layouts=(layout,), special=False))
    def check(case: Case) -> None:
        for ours, expected in zip(gradients(case, native), expected_gradients(case), strict=True):
            assert same_bits(ours, expected), f"{ours}\n{expected}"

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_found_no_room_gets_no_gradient(native: backend.Ops, layout: str) -> None:
    case = prompt_without_room(layout)
    for ours, expected in zip(gradients(case, native), expected_gradients(case), strict=True):
        assert same_bits(ours, expected)


@pytest.fixture
def shared() -> Callable[..., Case]:
    """Many rows that share prompts and tokens, so that every gradient is a long sum."""

    def make(layout: str = "padded", dtype: torch.dtype = torch.float32) -> Case:
        rows, tokens, dim = 64, 32, 520
        return Case(
            torch.randint(20, (rows, tokens)),
            torch.randn(20, dim, dtype=dtype),
            torch.randn(30, dim),
            [0, 10, 30],
            (torch.arange(rows) % 3 - 1).tolist(),
            torch.rand(rows, tokens) < 0.8,
            None,
            {"layout": layout},
            (torch.randn(2, 12, 3), torch.randn(2, 3, dim)),
        )

    return make


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_sums_equal_their_definition(shared: Callable[..., Case], layout: str, dtype: torch.dtype) -> None:
    case = shared(layout, dtype)
    for ours, expected in zip(gradients(case, backend.native_ops()), expected_gradients(case), strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_run(shared: Callable[..., Case], layout: str, dtype: torch.dtype) -> None:
    case = shared(layout, dtype)
    first = gradients(case, backend.native_ops())
    for count in (1, 2, 3, 7):
        with threads(count):
            for one, other in zip(first, gradients(case, backend.native_ops()), strict=True):
                assert torch.equal(one, other), count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, native: backend.Ops) -> Iterator[list[str]]:
    """Names of the native ops in the order in which they were called."""
    names: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        def op(*arguments: object) -> object:
            names.append(name)
            return getattr(native, name)(*arguments)

        return op

    with using(backend.Ops(**{field.name: counted(field.name) for field in fields(native)})):
        yield names


@pytest.mark.parametrize("wanted", ["prompts", "embedding"])
def test_computes_only_the_gradient_that_is_needed(shared: Callable[..., Case], calls: list[str], wanted: str) -> None:
    case = shared()
    leaf = getattr(case, wanted).requires_grad_()
    batch = spf.assemble(case.input_ids, case.embedding, case.prompts, case.prompt_offsets, case.prompt_ids)
    batch.inputs_embeds.sum().backward()
    assert calls == ["assemble", "prompt_backward" if wanted == "prompts" else "embedding_backward"]
    other = case.embedding if wanted == "prompts" else case.prompts
    assert leaf.grad is not None and other.grad is None


def test_computes_the_gradient_of_token_factors_alone(shared: Callable[..., Case], calls: list[str]) -> None:
    case = shared()
    assert case.token_factors is not None
    a, b = case.token_factors
    b.requires_grad_()
    case.run(backend.native_ops()).inputs_embeds.sum().backward()
    assert calls == ["assemble", "embedding_backward"]
    assert b.grad is not None and a.grad is None and case.prompts.grad is None


@pytest.mark.parametrize("native_ops", [True, False])
def test_a_token_that_does_not_exist_gives_its_update_no_gradient(backend_name: str, native_ops: bool) -> None:
    a, b = torch.ones(1, 3, 1, requires_grad=True), torch.ones(1, 1, 2)
    with using(backend.native_ops() if native_ops else None):
        embeds = spf.assemble(
            torch.tensor([[0, 9, 1]]), torch.randn(2, 2), torch.randn(1, 2), [0, 1], token_factors=(a, b), check=False
        ).inputs_embeds
    assert not embeds[0, 2].any()
    (grad,) = torch.autograd.grad(embeds.sum(), a)
    assert grad.flatten().tolist() == [2, 0, 2]


def test_no_gradient_without_need(shared: Callable[..., Case]) -> None:
    case = shared()
    assert case.run(backend.native_ops()).inputs_embeds.grad_fn is None
    case.prompts.requires_grad_()
    with torch.no_grad():
        assert case.run(backend.native_ops()).inputs_embeds.grad_fn is None
    batch = case.run(backend.native_ops())
    assert batch.inputs_embeds.requires_grad
    assert not any(tensor.requires_grad for tensor in (batch.attention_mask, batch.position_ids, batch.token_slots))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("native_ops", [True, False])
def test_padding_idx_gets_no_gradient(
    shared: Callable[..., Case], backend_name: str, native_ops: bool, layout: str
) -> None:
    ops = backend.native_ops() if native_ops else None
    case = shared(layout)
    _, free, _ = gradients(case, ops)
    case.options["padding_idx"] = 7
    _, held, _ = gradients(case, ops)
    assert free[7].any() and not held[7].any()
    assert torch.equal(torch.cat([free[:7], free[8:]]), torch.cat([held[:7], held[8:]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_any_strides(shared: Callable[..., Case], layout: str) -> None:
    case = shared(layout)
    shape = case.run(backend.native_ops()).inputs_embeds.shape
    whole = torch.randn(shape[2], shape[1], shape[0]).permute(2, 1, 0)
    for grad in (whole, torch.randn(shape[2]).expand(shape)):
        for strided, plain in zip(
            gradients(case, backend.native_ops(), grad),
            gradients(case, backend.native_ops(), grad.contiguous()),
            strict=True,
        ):
            assert torch.equal(strided, plain)


def test_no_second_derivative(shared: Callable[..., Case], native: backend.Ops) -> None:
    """The backward pass is not differentiable: it must say so, not return zeros."""
    case = shared()
    case.prompts.requires_grad_()
    (grad,) = torch.autograd.grad((case.run(native).inputs_embeds ** 2).sum(), case.prompts, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
