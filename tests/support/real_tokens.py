"""Prompts made of real tokens: the plain model's ``generate`` on prompt and text together is then the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import softprompt_fast as spf

LENGTHS = {"short": 2, "long": 7}
ROWS: list[str | None] = ["long", None, "short", "long"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt_tokens(vocabulary: int = 90) -> dict[str, Tensor]:
    """Ids [P] of each prompt."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randint(6, vocabulary, (count,), generator=generator) for name, count in LENGTHS.items()}


def with_real_prompts(model: Any, kind: type[spf.SoftPromptModel] = spf.SoftPromptModel) -> spf.SoftPromptModel:
    """A model whose prompts are the vectors of :func:`prompt_tokens`."""
    tuned = kind(model)
    for name, ids in prompt_tokens().items():
        tuned.add_prompt(name, init=model.get_input_embeddings()(ids).detach().float())
    return tuned


def rows_alone(
    model: Any, ids: Tensor, mask: Tensor, prompts: Sequence[str | None], options: dict[str, Any]
) -> list[Tensor]:
    """The plain model's new tokens of each row: prompt and text as ids, alone, without padding."""
    tokens = prompt_tokens()
    found = []
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        text = row[real == 1]
        whole = text if prompt is None else torch.cat([tokens[prompt], text])
        found.append(model.generate(whole[None], **options)[:, len(whole) :])
    return found
