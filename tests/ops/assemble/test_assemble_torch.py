"""``assemble`` among PyTorch's own machinery: operator checks, compilation, autocast, modes and transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from support.op_cases import Case, cases, op_call
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import softprompt_fast as spf
from softprompt_fast.ops.assemble.checks import LAYOUTS, MASK_FORMATS
from softprompt_fast.ops.extension import backend

OFFSETS, PROMPT_IDS = [0, 3, 5], [1, -1, 0, 1]


class Model(nn.Module):
    """A bank of two prompts before an embedding, updates of their first five tokens, and what reads the result."""

    def __init__(self, rank: int | None = 2, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.prompts = nn.Parameter(torch.randn(5, 6))
        self.a = None if rank is None else nn.Parameter(torch.randn(2, 5, rank))
        self.b = None if rank is None else nn.Parameter(torch.randn(2, rank, 6))
        self.head = nn.Linear(6, 1)
        self.options = options

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch = spf.assemble(
            input_ids,
            self.embedding.weight,
            self.prompts,
            OFFSETS,
            PROMPT_IDS,
            attention_mask,
            token_factors=None if self.a is None else (self.a, self.b),
            **self.options,
        )
        return self.head(batch.inputs_embeds).tanh() * (batch.position_ids[..., None] + 1)

    def gradients(self, run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(run(*inputs).sum(), list(self.parameters())))


def inputs(tokens: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (4, tokens)), torch.arange(tokens) < torch.tensor([[tokens], [2], [0], [3]])


@settings(max_examples=15)
@given(cases(special=False))
def test_opcheck_assemble(native: backend.Ops, case: Case) -> None:
    call = op_call(case)
    # opcheck itself cannot copy an empty tensor whose rows are further apart than they are long, nor one with several
    # empty dimensions.
    assume(not any(list(x.shape).count(0) > 1 for x in call if isinstance(x, Tensor)))
    plain = (torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) and not x.numel() else x for x in call)
    torch.library.opcheck(native.assemble, tuple(plain))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prompt_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_backward(native: backend.Ops, layout: str, prompt_dtype: torch.dtype) -> None:
    input_ids, mask = inputs()
    embedding, prompts = torch.randn(11, 6, dtype=torch.bfloat16), torch.randn(5, 6).to(prompt_dtype)
    batch = spf.assemble(input_ids, embedding, prompts, OFFSETS, PROMPT_IDS, mask, layout=layout)
    grad = torch.randn_like(batch.inputs_embeds)
    ids = PROMPT_IDS if batch.packed is None else batch.packed.prompts
    torch.library.opcheck(
        native.prompt_backward,
        (grad, batch.prompt_slots, torch.tensor(ids), torch.tensor(OFFSETS), len(prompts), prompt_dtype),
    )
    torch.library.opcheck(native.embedding_backward, (grad, input_ids, batch.token_slots, 11, 4, 0.5, prompt_dtype))


@pytest.mark.parametrize("mask_format", MASK_FORMATS)
@pytest.mark.parametrize(("padding_side", "rank"), [("left", None), ("right", 2)])
def test_compiles_without_a_graph_break(
    backend_name: str, padding_side: str, rank: int | None, mask_format: str
) -> None:
    torch._dynamo.reset()
    model = Model(rank, padding_side=padding_side, mask_format=mask_format, embedding_scale=2.5)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 7, 12, 1):
        ids, mask = inputs(tokens)
        torch.testing.assert_close(compiled(ids, mask), model(ids, mask), rtol=0, atol=0)
        for ours, eager in zip(model.gradients(compiled, ids, mask), model.gradients(model, ids, mask), strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("tensor_of_prompts", [True, False])
def test_compiles_with_tensors_of_prompts(backend_name: str, tensor_of_prompts: bool) -> None:
    """Ids and offsets as tensors are inputs of the graph; then the width must be given."""
    torch._dynamo.reset()
    prompts, embedding = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6)
    offsets = torch.tensor(OFFSETS) if tensor_of_prompts else OFFSETS

    def run(input_ids: Tensor, prompt_ids: Tensor) -> Tensor:
        return spf.assemble(input_ids, embedding, prompts, offsets, prompt_ids, max_prompt_length=3).inputs_embeds

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (PROMPT_IDS, [0, 0, -1, 1]):
        arguments = inputs()[0], torch.tensor(ids)
        assert torch.equal(compiled(*arguments), run(*arguments))
        for grad in zip(
            *(torch.autograd.grad(f(*arguments).square().sum(), prompts) for f in (compiled, run)), strict=True
        ):
            assert torch.equal(*grad)


@pytest.mark.slow
def test_compiles_with_inductor(backend_name: str) -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        ids, mask = inputs(tokens)
        torch.testing.assert_close(model.gradients(compiled, ids, mask), model.gradients(model, ids, mask))


def test_packed_compiles_with_lengths_on_the_host(backend_name: str) -> None:
    torch._dynamo.reset()
    model = Model(layout="packed", lengths=[7, 2, 0, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = inputs()
    assert torch.equal(compiled(ids, mask), model(ids, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_changes_nothing(backend_name: str, layout: str) -> None:
    input_ids, mask = inputs()
    embedding, prompts = torch.randn(11, 6), torch.randn(5, 6, requires_grad=True)
    factors = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        embeds = spf.assemble(
            input_ids, embedding, prompts, OFFSETS, PROMPT_IDS, mask, token_factors=factors, layout=layout
        ).inputs_embeds
        return embeds, *torch.autograd.grad(embeds.square().sum(), (prompts, *factors))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modes_without_gradient(backend_name: str, layout: str, mode: Callable[[], torch.no_grad]) -> None:
    model, (ids, mask) = Model(layout=layout), inputs()
    with mode():
        result = model(ids, mask)
    assert not result.requires_grad and torch.equal(result, model(ids, mask))


def test_functional_call(backend_name: str) -> None:
    model, (ids, mask) = Model(), inputs()
    others = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    called = torch.func.functional_call(model, others, (ids, mask))
    model.load_state_dict(others)
    assert torch.equal(called, model(ids, mask))


@pytest.mark.parametrize("mask_format", MASK_FORMATS)
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_without_data(backend_name: str, where: str, mask_format: str) -> None:
    model, (ids, mask) = Model(padding_side="left", mask_format=mask_format), inputs()
    real = model(ids, mask)
    if where == "meta":
        shown = model.to("meta")(ids.to("meta"), mask.to("meta"))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shown = model(mode.from_tensor(ids), mode.from_tensor(mask))
    assert shown.shape == real.shape and shown.dtype == real.dtype
