"""A base with a LoRA or another adapter of PEFT, two prompts over it, and text that each row continues alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import softprompt_fast as spf
from support.peft_models import IDS
from support.rows_alone import PROMPTS, alone
from support.tiny_models import build

TARGETS = ["q_proj", "v_proj", "up_proj"]
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": TARGETS, "init_lora_weights": False}


def _peft() -> Any:
    import peft

    return peft


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: _peft().LoraConfig(**LORA),
    "dora": lambda: _peft().LoraConfig(**LORA, use_dora=True),
    "ia3": lambda: _peft().IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": lambda: _peft().LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "oft": lambda: _peft().OFTConfig(r=2, oft_block_size=0, target_modules=TARGETS, init_weights=False),
    "vera": lambda: _peft().VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "norms": lambda: _peft().LNTuningConfig(task_type="CAUSAL_LM"),
    "llama-adapter": lambda: _peft().AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
    "head-and-embedding": lambda: _peft().LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "lora-of-the-embedding": lambda: _peft().LoraConfig(**LORA | {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": lambda: _peft().LoraConfig(**LORA, trainable_token_indices=list(range(3, 50))),
}


def adapted(kind: str = "lora", **options: Any) -> Any:
    """A model whose adapter changes its results."""
    config = KINDS[kind]() if not options else _peft().LoraConfig(**LORA | options)
    model = _peft().get_peft_model(build("llama"), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def with_prompts(model: Any, **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(model, **options)
    torch.manual_seed(3)
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32) * 0.5)
    return tuned


def trained(tuned: spf.SoftPromptModel) -> list[str]:
    return [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]


def greedy(tuned: spf.SoftPromptModel, ids: Tensor, prompt: str, count: int = 6) -> list[int]:
    """The likeliest tokens after a row alone, without a cache."""
    for _ in range(count):
        output, _ = alone(tuned, ids, prompt)
        ids = torch.cat([ids, output.logits[0, -1:].argmax(-1)])
    return ids.tolist()


def check_generated(tuned: spf.SoftPromptModel) -> list[list[int]]:
    """Generates text with both prompts, and compares it with each row alone."""
    rows = ["long", "short", "long", "short"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = tuned.generate(IDS, prompt_ids=rows, **options).tolist()
    with torch.no_grad():
        assert tokens == [greedy(tuned, ids, prompt) for ids, prompt in zip(IDS, rows, strict=True)]
    return tokens


def two_adapters() -> Any:
    model = adapted()
    model.add_adapter("other", _peft().LoraConfig(**LORA))
    return model.eval()


def add_to_the_adapter(model: Any) -> None:
    """A step of training, as an optimiser takes it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
