"""Models on a GPU: packed batches, compiled prompts and generation equal each row alone on the same device."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
import torch
from support.devices import DEVICE, NEEDS_STREAMS, ON_GPU
from support.rows_alone import ROWS, alone, relative, tuned_model
from support.tiny_models import batch

import softprompt_fast as spf
from softprompt_fast.compiled import decoding
from softprompt_fast.compiled.decode_graph import DecodeGraph
from softprompt_fast.compiled.decoding import EAGER_STEPS, DecodeGraphs
from softprompt_fast.inference import PromptBank
from softprompt_fast.packed.cuda_graphs import EAGER_BATCHES

pytestmark = ON_GPU
MODELS = ["llama", "mistral-window", "gpt2", "gemma2", "gemma3"]
TOLERANCE = 1e-4
"""float32 products may be summed in another order for another number of rows."""


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def on_device(name: str) -> spf.SoftPromptModel:
    tuned = tuned_model(name)
    tuned.base_model.to(DEVICE)
    return tuned.to(DEVICE)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_each_row_alone(name: str) -> None:
    tuned = on_device(name)
    ids, mask = (x.to(DEVICE) for x in batch())
    output = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    assert tuned.execution_report().execution == "shared"
    output.logits.float().pow(2).sum().backward()
    total, parts = 0.0, []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, used = alone_on_device(tuned, ids[row][real], prompt)
        assert relative(output.logits[row][real], expected.logits[0, len(used) :]) < TOLERANCE
        total = total + expected.logits[0, len(used) :].float().pow(2).sum()
        parts.append((prompt, used))
    assert isinstance(total, torch.Tensor)
    total.backward()
    for prompt in ("short", "long"):
        wanted = sum(used.grad for owner, used in parts if owner == prompt)
        got = tuned.prompts[prompt].grad
        assert ((got - wanted).norm() / wanted.norm()).item() < TOLERANCE


def alone_on_device(tuned: spf.SoftPromptModel, ids: torch.Tensor, prompt: str | None) -> tuple[Any, torch.Tensor]:
    with torch.device(DEVICE):
        return alone(tuned, ids, prompt)


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_equal_each_row_alone(name: str) -> None:
    tuned = on_device(name)
    ids, mask = (x.to(DEVICE) for x in batch(padding="left"))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = tuned.generate(ids, mask, ROWS, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(ROWS):
        expected = tuned.generate(ids[row][mask[row].bool()][None], None, [prompt], **options)[0, -6:]
        assert torch.equal(found[row], expected)


def test_compiled_prompts_give_the_logits_of_the_prompts() -> None:
    tuned = on_device("llama")
    ids, mask = (x.to(DEVICE) for x in batch())
    expected = tuned.next_token_logits(ids, mask, ROWS)
    bank = PromptBank(tuned)
    with bank.use(ROWS) as view:
        from softprompt_fast.inference.engine import Engine

        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        last = torch.tensor([(row, len(text) - 1) for row, text in enumerate(rows)])
        found = torch.stack(list(Engine(bank).logits_at(view, rows, ROWS, last)))
    assert relative(found, expected.detach()) < TOLERANCE


@NEEDS_STREAMS
class TestCudaGraphs:
    """In bfloat16, because a library computes the attention there."""

    TOLERANCE = 0.03

    def models(self, name: str) -> tuple[spf.SoftPromptModel, spf.SoftPromptModel]:
        with_graphs = tuned_model(name)
        with_graphs.base_model.to(DEVICE, torch.bfloat16)
        with_graphs.to(DEVICE)
        return with_graphs, spf.SoftPromptModel(with_graphs.base_model, with_graphs.prompts, cuda_graphs=False)

    def step(self, model: spf.SoftPromptModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        model.prompts.zero_grad()
        output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
        output.loss.backward()
        return [output.logits.detach(), *(model.prompts[prompt].grad.clone() for prompt in ("short", "long"))]

    def assert_same_steps(self, models: tuple[spf.SoftPromptModel, spf.SoftPromptModel], loader: Any) -> None:
        for ids, mask in loader:
            ids, mask = ids.to(DEVICE), mask.to(DEVICE)
            found, expected = (self.step(model, ids, mask) for model in models)
            for one, other in zip(found, expected, strict=True):
                assert ((one - other).norm() / other.norm()).item() < self.TOLERANCE

    @pytest.mark.parametrize("name", MODELS)
    def test_steps_equal_those_without(self, name: str) -> None:
        models = self.models(name)
        ids, mask = batch()
        self.assert_same_steps(models, [((ids + i) % 50, mask) for i in range(EAGER_BATCHES + 3)])
        runner = models[0].runner
        assert runner is not None and runner.graphs is not None
        assert len(runner.graphs) > 0 or getattr(models[0].config, "attn_logit_softcapping", None), (
            runner.graphs.stopped
        )

    def test_a_loader_may_pin_memory_meanwhile(self) -> None:
        ids, mask = batch()
        rows = [((ids + i) % 50, mask) for i in range(4 * EAGER_BATCHES)]
        loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1, pin_memory=True)
        models = self.models("llama")
        self.assert_same_steps(models, loader)
        assert models[0].runner is not None and len(models[0].runner.graphs or ()) > 0

    def test_a_capture_that_fails_does_no_harm(self, caplog: pytest.LogCaptureFixture) -> None:
        ids, mask = batch()
        rows = [((ids + i) % 50, mask) for i in range(EAGER_BATCHES + 3)]
        models = self.models("llama")
        layer = models[0].base_model.model.layers[1].mlp
        original = type(layer).forward

        def waiting(self: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.sum().item() == x.sum().item()
            return original(self, x)

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(type(layer), "forward", waiting)
            self.assert_same_steps(models, rows)
        assert "does not run as CUDA graphs" in caplog.text
        assert torch.randn(1000, device=DEVICE).std() > 0.5
        others = self.models("llama")
        self.assert_same_steps(others, rows)
        assert others[0].runner is not None and len(others[0].runner.graphs or ()) > 0


@NEEDS_STREAMS
class TestStepsOfGeneration:
    """Single tokens that are replayed as CUDA graphs; see ``compiled/decoding.py``."""

    OPTIONS: ClassVar[dict[str, Any]] = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}

    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays = 0
        original = DecodeGraph.replay

        def replay(graph: DecodeGraph) -> torch.Tensor:
            self.replays += 1
            return original(graph)

        monkeypatch.setattr(DecodeGraph, "replay", replay)

    def models(self, name: str, dtype: torch.dtype) -> tuple[spf.SoftPromptModel, spf.SoftPromptModel]:
        with_graphs = on_device(name)
        with_graphs.base_model.to(dtype)
        return with_graphs, spf.SoftPromptModel(with_graphs.base_model, with_graphs.prompts, cuda_graphs=False)

    def generated(self, model: spf.SoftPromptModel, shorter: int = 0, **options: Any) -> Any:
        torch.manual_seed(3)
        ids, mask = (x[:, shorter:].to(DEVICE) for x in batch(padding="left"))
        return model.generate(ids, mask, ROWS, **(self.OPTIONS | options))

    def graphs(self, model: spf.SoftPromptModel) -> DecodeGraphs:
        continuation = model._generator.continuation
        assert continuation is not None and continuation.graphs is not None
        return continuation.graphs

    @pytest.mark.parametrize("name", MODELS)
    def test_tokens_equal_those_without(self, name: str) -> None:
        models = self.models(name, torch.float32)
        for shorter, sample in ((0, False), (2, True), (1, False)):
            found, expected = (self.generated(model, shorter, do_sample=sample) for model in models)
            assert torch.equal(found, expected)
        graphs = self.graphs(models[0])
        assert graphs.stopped is None and len(graphs) == 1 and self.replays == 3 * 39 - EAGER_STEPS

    def test_logits_in_bfloat16_equal_those_without(self) -> None:
        models = self.models("llama", torch.bfloat16)
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        found, expected = (self.generated(model, **options) for model in models)
        alike = torch.ones(len(ROWS), dtype=torch.bool, device=DEVICE)
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert ((one - other)[alike].norm() / other[alike].norm()).item() < 0.03
            alike &= one.argmax(-1) == other.argmax(-1)  # from here on a row may go another way
            if not alike.any():
                break
        assert self.graphs(models[0]).stopped is None and self.replays == 39 - EAGER_STEPS

    def test_a_text_may_outgrow_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "GROWTH", 8)
        monkeypatch.setattr(decoding, "HORIZON", 8)
        models = self.models("llama", torch.float32)
        found, expected = (self.generated(model, do_sample=False) for model in models)
        assert torch.equal(found, expected)
        assert self.graphs(models[0]).stopped is None and len(self.graphs(models[0])) >= 3

    def test_changed_weights_are_seen(self) -> None:
        models = self.models("llama", torch.float32)
        before = self.generated(models[0], do_sample=False)
        layer = models[0].base_model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
        found, expected = (self.generated(model, do_sample=False) for model in models)
        assert torch.equal(found, expected) and not torch.equal(found, before)

    def test_a_capture_that_fails_does_no_harm(self, caplog: pytest.LogCaptureFixture) -> None:
        models = self.models("llama", torch.float32)
        layer = type(models[0].base_model.model.layers[1].mlp)
        original = layer.forward

        def waiting(self: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.sum().item() == x.sum().item()
            return original(self, x)

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(layer, "forward", waiting)
            found, expected = (self.generated(model, do_sample=False) for model in models)
        assert torch.equal(found, expected) and "does not decode as CUDA graphs" in caplog.text
        assert torch.randn(1000, device=DEVICE).std() > 0.5
        others = self.models("llama", torch.float32)
        assert torch.equal(*(self.generated(model, do_sample=True) for model in others)) and self.replays
