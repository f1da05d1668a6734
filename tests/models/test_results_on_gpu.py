"""Heads, adapters, PEFT scripts and compressed texts give on a GPU what they give on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import DEVICE, NEEDS_STREAMS, ON_GPU
from support.peft_models import batch as peft_batch
from support.peft_models import losses, peft_model
from support.rows_alone import PROMPTS, ROWS, relative
from support.tiny_models import batch, build
from support.tiny_text import compressed
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.packed.cuda_graphs import EAGER_BATCHES

pytestmark = ON_GPU
TOLERANCE = 1e-4
HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]
MODELS = [("llama", "padded"), ("llama", "shared"), ("gpt2", "shared"), ("bert", "padded")]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def targets(head: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if head == "SequenceClassification":
        return {"labels": torch.tensor([0, 1, 1, 0])}
    if head == "TokenClassification":
        return {"labels": torch.where(ids % 3 == 0, -100, ids % 2)}
    first = mask.long().argmax(1)
    return {"start_positions": first, "end_positions": first + 1}


def results(tuned: spf.SoftPromptModel, inputs: dict[str, Tensor], device: str) -> list[Tensor]:
    """The loss, the logits and the gradients of the prompts, on the CPU."""
    tuned.base_model.to(device)
    tuned.to(device)
    tuned.zero_grad()
    output = tuned(**{name: value.to(device) for name, value in inputs.items()}, prompt_ids=ROWS)
    output.loss.backward()
    found = [value for name, value in output.items() if name == "loss" or name.endswith("logits")]
    found += [tuned.prompts[prompt].grad for prompt in PROMPTS]
    return [value.detach().cpu().clone() for value in found]


def with_prompts(model: Any, execution: str = "auto") -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(model, execution=execution)
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    return tuned


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "execution"), MODELS)
def test_a_head(name: str, execution: str, head: str) -> None:
    tuned = with_prompts(build(name, head=head), execution)
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask} | targets(head, ids, mask)
    expected = results(tuned, inputs, "cpu")
    for one, other in zip(results(tuned, inputs, DEVICE), expected, strict=True):
        assert relative(one, other) < TOLERANCE
    assert tuned.execution_report().execution == execution


@NEEDS_STREAMS
def test_a_classifier_trains_with_graphs_as_without() -> None:
    found = []
    for cuda_graphs in (True, False):
        torch.manual_seed(0)
        model = build("llama", head="SequenceClassification").to(DEVICE, torch.bfloat16)
        tuned = spf.SoftPromptModel(model, cuda_graphs=cuda_graphs).to(DEVICE)
        prompt = tuned.add_prompt("p", init=torch.randn(5, tuned.prompts.embedding_dim) * 0.5)
        head = model.score.weight.requires_grad_()
        ids, mask = (x.to(DEVICE) for x in batch())
        gradients = []
        for i in range(EAGER_BATCHES + 3):
            tuned.zero_grad()
            tuned((ids + i) % 50, mask, labels=torch.tensor([0, 1, 1, 0], device=DEVICE)).loss.backward()
            gradients.append((prompt.grad.float().clone(), head.grad.float().clone()))
        found.append(gradients)
        assert not cuda_graphs or len(tuned.runner.graphs) == 1, tuned.runner.graphs.stopped
    for some, others in zip(*found, strict=True):
        for one, other in zip(some, others, strict=True):
            assert ((one - other).norm() / other.norm()).item() < 0.05


def test_a_model_with_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = with_prompts(peft.get_peft_model(build("llama"), config))
    ids, mask = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = results(tuned, inputs, "cpu")
    for one, other in zip(results(tuned, inputs, DEVICE), expected, strict=True):
        assert relative(one, other) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("llama", "CausalLM", "PromptTuning"),
        ("llama", "CausalLM", "PrefixTuning"),
        ("llama", "CausalLM", "Cartridge"),
        ("llama", "SequenceClassification", "PromptTuning"),
        ("bert", "SequenceClassification", "PromptTuning"),
        ("t5", "Seq2SeqLM", "PromptTuning"),
    ],
)
def test_an_accelerated_peft_script(name: str, head: str, kind: str) -> None:
    pytest.importorskip("peft")
    inputs = peft_batch("right", head)
    expected = losses(spf.accelerate(peft_model(name, head, kind)), inputs, 8)
    model = spf.accelerate(peft_model(name, head, kind).to(DEVICE))
    found = losses(model, {key: value.to(DEVICE) for key, value in inputs.items()}, 8)
    assert found == pytest.approx(expected, rel=1e-3)
    assert abs(expected[0] - expected[-1]) > 0.05


@pytest.mark.parametrize("divergence", ["forward", "mixed"])
@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_a_compressed_text(form: str, divergence: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"form": form, "divergence": divergence, "steps": 30, "learning_rate": 0.1}
    (expected,) = compressed(tmp_path / "cpu", model=build("llama"), **options).prompts
    (found,) = compressed(tmp_path / "device", model=build("llama").to(DEVICE), **options).prompts
    assert found.init == expected.init
    if divergence == "forward":  # samples are drawn by each device's own generator
        assert found.retention.kl == pytest.approx(expected.retention.kl, rel=0.05)
        assert found.loss < 0.8 * found.init_losses[found.init]
    assert found.loss == pytest.approx(expected.loss, rel=0.05 if divergence == "forward" else 1)
