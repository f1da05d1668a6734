"""Deep prompts: trained keys and values of every layer; each row equals the row alone on a cache of its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import ROWS, relative
from tiny_models import batch, build
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

import softprompt_fast as spf
from softprompt_fast.peft_format import read_prompt

NAMES = ["llama", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox"]
LENGTHS = {"short": 2, "long": 7}


def deep_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> spf.DeepPromptModel:
    tuned = spf.DeepPromptModel(build(name, dtype=dtype), **options)
    for prompt, length in LENGTHS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    return tuned


def alone(tuned: spf.DeepPromptModel, ids: Tensor, values: Tensor | None) -> Tensor:
    """Logits [T, V] of one row, nothing of the library in between: a cache filled by hand in PEFT's order."""
    model = tuned.base_model
    cache = DynamicCache()
    length = 0 if values is None else len(values)
    if values is not None:
        layers, _, heads, size = tuned.shared.shape
        by_layer = values.to(model.dtype).view(1, length, 2 * layers, heads, size).permute(2, 0, 3, 1, 4).split(2)
        for layer, (key, value) in enumerate(by_layer):
            cache.update(key, value, layer)
    positions = torch.arange(length, length + len(ids))[None]
    return model(input_ids=ids[None], position_ids=positions, past_key_values=cache).logits[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_each_row_alone(name: str) -> None:
    tuned = deep_model(name)
    ids, mask = batch()
    with torch.no_grad():
        logits = tuned(ids, mask, prompt_ids=ROWS).logits
        last = tuned.next_token_logits(ids, mask, ROWS)
        places = torch.stack([torch.arange(len(ids)), mask.argmax(1)], 1)
        first = tuned.logits_at(ids, mask, ROWS, places)
        for row, prompt in enumerate(ROWS):
            real = mask[row].bool()
            expected = alone(tuned, ids[row][real], None if prompt is None else tuned.prompts[prompt])
            assert relative(logits[row][real], expected) < 1e-5
            assert relative(last[row], expected[-1]) < 1e-5
            assert relative(first[row], expected[0]) < 1e-5
            assert not logits[row][~real].any()
    assert tuned.execution_report().execution == "shared" and "inference" in tuned.execution_report().checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_each_row_alone(name: str, dtype: torch.dtype) -> None:
    tuned = deep_model(name, dtype)
    ids, mask = batch()
    labels = torch.where(torch.rand(ids.shape) < 0.6, ids, -100).masked_fill(mask == 0, 7)
    output = tuned(ids, mask, labels=labels, prompt_ids=ROWS)
    output.loss.backward()
    used = {prompt: tuned.prompts[prompt].detach().clone().requires_grad_() for prompt in LENGTHS}
    losses, count = [], 0
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        logits = alone(tuned, ids[row][real], None if prompt is None else used[prompt])
        target = labels[row][real][1:]
        losses.append(nn.functional.cross_entropy(logits[:-1], target, reduction="sum"))
        count += int((target != -100).sum())
    expected = torch.stack(losses).sum() / count
    expected.backward()
    assert relative(output.loss, expected) < 1e-5
    for prompt, values in used.items():
        got = tuned.prompts[prompt].grad
        assert ((got - values.grad).norm() / values.grad.norm()).item() < 1e-5
    assert "training" in tuned.execution_report().checked
