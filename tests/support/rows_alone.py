"""A model with two prompts, and the oracle: each row run alone, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import softprompt_fast as spf
from support.tiny_models import build

PROMPTS = {"short": 2, "long": 7}


ROWS = ["long", None, "short", "long"]


def tuned_model(name: str, **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build(name, **options))
    width = tuned.prompts.embedding_dim
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, width) * 0.5)
    return tuned


def alone(tuned: spf.SoftPromptModel, ids: Tensor, prompt: str | None, **options: Any) -> tuple[Any, Tensor]:
    """One unpadded row through the base model, its prompt joined by torch.cat; and the prompt used."""
    vectors = tuned.get_input_embeddings()(ids[None])
    used = torch.zeros(0, vectors.shape[-1], requires_grad=True)
    if prompt is not None:
        used = tuned.prompts[prompt].detach().clone().requires_grad_()
    joined = torch.cat([used.to(vectors.dtype)[None], vectors], 1)
    return tuned.base_model(inputs_embeds=joined, **options), used


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
