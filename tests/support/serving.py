"""A bank of prompts on a tiny model, the requests of tests, and each row run alone."""

from __future__ import annotations

from typing import Any

import torch

from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from support.tiny_models import DECODERS, build, changes_mask, own_attention
from support.tiny_reviews import tiny_tokenizer

LENGTHS = {"short": 1, "middle": 7, "long": 60}
TEXTS = ["fine film", "very very dull plot film", "great", "no plot", "very lovely film plot : yes", "poor"]
NAMES = ["middle", "long", None, "short", "long", "middle"]
LABELS = {"good": "fine", "bad": "dull"}
UNCOMPILED = {name for name in DECODERS if own_attention(name) or changes_mask(name)}


def filled(model: Any, **options: Any) -> PromptBank:
    bank = PromptBank(model, **options)
    generator = torch.Generator().manual_seed(1)
    for name, length in LENGTHS.items():
        bank.add(name, torch.randn(length, bank.model.prompts.embedding_dim, generator=generator))
    return bank


def pipeline(name: str = "llama", **options: Any) -> SoftPromptPipeline:
    return SoftPromptPipeline(filled(build(name), **options), tiny_tokenizer())


def alone(pipe: SoftPromptPipeline, text: str, name: str | None) -> torch.Tensor:
    """[T, V], logits of a text behind its prompt, by the model itself, without padding, cache or packing."""
    base = pipe.bank.model.base_model
    vectors = base.get_input_embeddings()(torch.tensor(pipe.tokenizer(text).input_ids))
    prompt = vectors[:0] if name is None else pipe.bank[name]
    with torch.no_grad():
        return base(inputs_embeds=torch.cat([prompt, vectors])[None], use_cache=False).logits[0, len(prompt) :]
