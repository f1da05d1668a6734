"""Linear layers by oneDNN: the same values and gradients, only where they apply, and never in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.rows_alone import relative
from support.tiny_models import batch, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from softprompt_fast import SoftPromptModel
from softprompt_fast.base import machine
from softprompt_fast.hf import cpu_linear
from softprompt_fast.hf.cpu_linear import faster_products, is_faster

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")
ROWS, TOKENS = 8, 24


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were multiplied by oneDNN, on any machine."""
    shapes: list[tuple[int, ...]] = []
    multiply = cpu_linear._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(cpu_linear, "is_faster", lambda: True)
    monkeypatch.setattr(cpu_linear, "_product", counted)
    return shapes


def step(model: Any, trained: Sequence[nn.Module] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and the prompt's gradient of a batch."""
    torch.manual_seed(0)
    tuned = SoftPromptModel(model, check=False)
    for layer in trained:
        layer.requires_grad_()
    prompt = tuned.add_prompt("p", init=torch.randn(3, tuned.prompts.embedding_dim) * 0.5)
    ids, mask = batch(ROWS, TOKENS)
    output = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), return_logits=True)
    output.loss.backward()
    assert prompt.grad is not None
    return output.loss.detach(), output.logits.detach(), prompt.grad


@pytest.mark.parametrize(
    ("name", "head"), [("llama", None), ("qwen2", None), ("mixtral", None), ("bert", None), ("t5", None)]
)
def test_values_and_gradients_are_the_usual_ones(
    name: str, head: str | None, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, head)
    ours = step(model)
    forward_and_backward = len(products)
    assert forward_and_backward > 8
    monkeypatch.setattr(cpu_linear, "is_faster", lambda: False)
    for got, expected in zip(ours, step(model), strict=True):
        assert relative(got, expected) < 1e-5
    assert len(products) == forward_and_backward


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox"])
def test_trained_layers_give_the_same_values_and_the_usual_gradients(
    name: str, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    logits = step(model)[1]
    frozen = len(products)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][1:4]
    trained = [parameter for layer in layers for parameter in layer.parameters()]
    products.clear()
    ours = step(model, layers)
    assert torch.equal(ours[1], logits) and len(products) == frozen
    gradients = [parameter.grad for parameter in trained]
    model.zero_grad()
    monkeypatch.setattr(cpu_linear, "is_faster", lambda: False)
    usual = step(model, layers)
    for got, expected in zip([*ours, *gradients], [*usual, *(one.grad for one in trained)], strict=True):
        assert got is not None and expected is not None and relative(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype, products: list[Any]) -> None:
    step(build("llama", dtype=dtype))
    assert not products


def test_small_batches_and_autocast_are_left_alone(products: list[Any]) -> None:
    tuned = SoftPromptModel(build("llama"), check=False)
    tuned.add_prompt("p", 1)
    ids = torch.tensor([[5, 6]])
    tuned(ids)
    with torch.autocast("cpu", torch.bfloat16):
        tuned(ids.repeat(10, 1))
    assert not products
    tuned(ids.repeat(10, 1))
    assert products


def test_every_kind_of_call_gives_what_linear_gives(products: list[Any]) -> None:
    """Calls that oneDNN cannot take, or that another tool watches, go to F.linear."""
    model = build("llama")
    weight = torch.randn(5, 4)
    strided = torch.randn(4, 5).t()
    x = torch.randn(70, 4)
    calls: list[Callable[[], Tensor]] = [
        lambda: F.linear(x, weight=weight),
        lambda: F.linear(x, strided),
        lambda: F.linear(x[:0], weight),
        lambda: F.linear(x, weight, torch.randn(5, generator=torch.Generator().manual_seed(0))),
        lambda: torch.func.vmap(lambda row: F.linear(row, weight))(x),
        lambda: torch.func.jvp(lambda y: F.linear(y, weight), (x,), (x,))[1],
        lambda: torch.func.grad(lambda y: F.linear(y, weight).square().sum())(x),
        lambda: F.linear(x.double(), weight.double()),
        lambda: F.linear(x[:, None].expand(-1, 3, -1), weight),
        lambda: F.linear(x[0], weight),
        lambda: F.linear(x, weight[0]),
        lambda: F.linear(x, weight, weight.flatten()[:10:2]),
        lambda: F.linear(x, weight, weight[:1, 0].expand(5)),
        lambda: F.linear(x, weight, weight[0, :1]),
        lambda: F.linear(x[:, None], weight).add_(1),
        lambda: F.linear(x[:, None].clone().requires_grad_(), weight).clamp_(max=0.5),
    ]
    for call in calls:
        expected = call()
        with faster_products(model, 70):
            got = call()
        torch.testing.assert_close(got, expected)
    assert products


def test_flop_counters_see_the_model_as_it_is(products: list[Any]) -> None:
    with FlopCounterMode(display=False) as counter:
        step(build("llama"))
    assert counter.get_total_flops() > 0
    assert not products


@pytest.mark.parametrize("bias", [(), (False,), (True,)])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("form", ["[M, K]", "[B, T, K]", "strided"])
def test_as_much_is_saved_as_linear_saves(
    bias: tuple[bool, ...], trained: tuple[bool, bool], form: str, products: list[Any]
) -> None:
    """Checkpointing compares the tensors of the forward pass with those of a second one outside."""
    x = torch.randn(70, 4) if form == "[M, K]" else torch.randn(7, 10, 4)
    x = (x.transpose(0, 1) if form == "strided" else x).requires_grad_(trained[0])
    weight = torch.randn(5, 4, requires_grad=trained[1])
    added = [torch.randn(5, requires_grad=one) for one in bias]
    given = [x, weight, *added]
    if not any(one.requires_grad for one in given):
        pytest.skip("nothing is trained")

    def saved() -> tuple[list[Any], list[Tensor | None]]:
        shapes: list[Any] = []
        for one in given:
            one.grad = None
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (shapes.append(one.shape), one)[1], lambda one: one):
            F.linear(*given).square().sum().backward()
        return shapes, [one.grad for one in given]

    shapes, gradients = saved()
    with faster_products(build("llama"), 70):
        ours, our_gradients = saved()
    assert ours == shapes and bool(products) == (form != "strided")
    torch.testing.assert_close(our_gradients, gradients)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpointed_layer_runs_again_outside(name: str, trained: bool, products: list[Any]) -> None:
    """torch's checkpointing recomputes in the backward pass, where the model's own products are used."""
    model = build(name)
    layer = model.model.layers[1]
    layers = [layer] if trained else []
    expected = step(model, layers)

    class Checkpointed(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            return checkpoint(super().forward, *args, use_reentrant=False, **options)

    layer.__class__ = Checkpointed
    gradients = [parameter.grad for parameter in layer.parameters()]
    model.zero_grad()
    for got, value in zip(step(model, layers), expected, strict=True):
        assert relative(got, value) < 1e-5
    for parameter, value in zip(layer.parameters(), gradients, strict=True):
        assert (parameter.grad is None and value is None) or relative(parameter.grad, value) < 1e-5
    assert products


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_base_runs(whole: bool, products: list[Any]) -> None:
    model = build("llama")
    expected = step(model)
    products.clear()
    (model if whole else model.model.layers[1]).compile(backend="eager")
    for got, value in zip(step(model), expected, strict=True):
        assert relative(got, value) < 1e-5
    assert not products


def test_the_choice_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    for vendor, expected in (("GenuineIntel", False), ("AuthenticAMD", usable), ("", False)):
        monkeypatch.setattr(cpu_linear, "cpu_vendor", lambda vendor=vendor: vendor)
        is_faster.cache_clear()
        assert is_faster() is expected
    monkeypatch.undo()
    is_faster.cache_clear()
    assert machine.cpu_vendor() == "" or machine.cpu_vendor().isalnum()


def test_an_op_of_another_form_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> Tensor:
        raise TypeError("_linear_pointwise() takes other arguments")

    monkeypatch.setattr(cpu_linear, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(cpu_linear, "_product", other)
    is_faster.cache_clear()
    assert not is_faster()
    monkeypatch.undo()
    is_faster.cache_clear()


def test_nothing_stays_behind(products: list[Any]) -> None:
    model = build("llama")
    step(model)
    products.clear()
    nn.Linear(4, 5).requires_grad_(False)(torch.randn(100, 4))
    model(batch(ROWS, TOKENS)[0])
    assert not products
