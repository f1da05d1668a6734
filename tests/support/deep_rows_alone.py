"""A model with deep prompts, and the oracle: each row run alone on a cache filled by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import softprompt_fast as spf
from support.tiny_models import build

LENGTHS = {"short": 2, "long": 7}


def deep_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> spf.DeepPromptModel:
    tuned = spf.DeepPromptModel(build(name, dtype=dtype), **options)
    for prompt, length in LENGTHS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    return tuned


def deep_alone(tuned: spf.DeepPromptModel, ids: Tensor, values: Tensor | None) -> Tensor:
    """Logits [T, V] of one row, nothing of the library in between: a cache filled by hand in PEFT's order."""
    model = tuned.base_model
    cache = DynamicCache()
    length = 0 if values is None else len(values)
    if values is not None:
        layers, _, heads, size = tuned.runner.shape
        by_layer = values.to(model.dtype).view(1, length, 2 * layers, heads, size).permute(2, 0, 3, 1, 4).split(2)
        for layer, (key, value) in enumerate(by_layer):
            cache.update(key, value, layer)
    positions = torch.arange(length, length + len(ids))[None]
    return model(input_ids=ids[None], position_ids=positions, past_key_values=cache).logits[0]
