"""A decoder that classifies rows runs as CUDA graphs below its head, which is trained."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from support.played_graphs import played_graphs
from support.rows_alone import PROMPTS, ROWS, relative
from support.tiny_models import batch, build
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.packed.cuda_graphs import EAGER_BATCHES

LABELS = torch.tensor([0, 1, 1, 0])


def steps(cuda_graphs: bool, name: str) -> list[list[Tensor]]:
    """Loss, logits and gradients of a few steps that also change the head."""
    model = build(name, head="SequenceClassification", dtype=torch.float64)  # rounding adds up over the steps
    tuned = spf.SoftPromptModel(model, cuda_graphs=cuda_graphs)
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    head = model.score.weight.requires_grad_()
    parameters = [head, *tuned.prompts.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    ids, mask = batch()
    found = []
    for i in range(EAGER_BATCHES + 4):
        output = tuned((ids + i) % 50, mask, labels=LABELS, prompt_ids=ROWS)
        output.loss.backward()
        found.append([output.loss.detach(), output.logits.detach(), *(one.grad.clone() for one in parameters)])
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()
    with torch.no_grad():
        found += [[tuned(ids, mask, prompt_ids=ROWS).logits] for _ in range(EAGER_BATCHES + 2)]
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_steps_equal_those_without_graphs(name: str) -> None:
    torch.manual_seed(0)
    expected = steps(False, name)
    torch.manual_seed(0)
    with played_graphs() as graphs:
        found = steps(True, name)
    assert graphs.replays > 4
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert relative(one, other) < 1e-5


def test_the_base_gets_its_attention_back_with_the_last_reference() -> None:
    model = build("llama", head="SequenceClassification")
    before = model.config._attn_implementation
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("p", 2)
    ids, mask = batch()
    with played_graphs() as graphs:
        for _ in range(EAGER_BATCHES + 2):
            tuned(ids, mask, labels=LABELS).loss.backward()
    assert graphs.replays and model.config._attn_implementation != before
    gc.disable()
    try:
        del tuned
        assert model.config._attn_implementation == before
    finally:
        gc.enable()


def test_a_copy_runs_its_own_decoder() -> None:
    tuned = spf.SoftPromptModel(build("llama", head="SequenceClassification"))
    tuned.add_prompt("p", 2)
    ids, mask = batch()
    with played_graphs():
        for _ in range(EAGER_BATCHES + 2):
            tuned(ids, mask, labels=LABELS).loss.backward()
        copied = copy.deepcopy(tuned)
        with torch.no_grad():
            tuned.base_model.model.norm.weight.zero_()
            for _ in range(EAGER_BATCHES + 2):
                assert copied(ids, mask).logits.abs().max() > 0
