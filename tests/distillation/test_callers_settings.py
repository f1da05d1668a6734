"""A compression does not depend on what the caller has set in PyTorch, and changes nothing of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny_models import build
from support.tiny_text import compressed

import softprompt_fast as spf
from softprompt_fast.distillation.initial_values import spread_places
from softprompt_fast.prompts.base_identity import base_fingerprint


@pytest.fixture
def default_dtype() -> Any:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("form", ["embeddings", "kv"])
@pytest.mark.parametrize(
    "within", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_modes_of_the_caller_do_not_count(
    within: Callable[[], AbstractContextManager[Any]], form: str, tmp_path: Path
) -> None:
    model = build("llama")
    plain = compressed(tmp_path / "plain", model=model, form=form, steps=3).prompts[0]
    with within():
        same = compressed(tmp_path / "within", model=model, form=form, steps=3).prompts[0]
    assert (plain.weights_sha256, plain.retention) == (same.weights_sha256, same.retention)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_count(dtype: torch.dtype, default_dtype: Any, tmp_path: Path) -> None:
    model = build("llama")
    plain, fingerprint = compressed(tmp_path / "plain", model=model, steps=3).prompts[0], base_fingerprint(model)
    places = spread_places(2000, 16)
    default_dtype(dtype)
    same = compressed(tmp_path / "other", model=model, steps=3).prompts[0]
    assert plain.weights_sha256 == same.weights_sha256 and plain.retention.kl == pytest.approx(same.retention.kl)
    assert base_fingerprint(model) == fingerprint and spread_places(2000, 16) == places


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prompts_are_float32_whatever_the_default_is(dtype: torch.dtype, default_dtype: Any) -> None:
    model, ids = build("llama"), torch.randint(3, 20, (2, 5))
    default_dtype(dtype)
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("a", 3)
    assert tuned.prompts["a"].dtype == torch.float32
    assert tuned.next_token_logits(ids, prompt_ids="a").dtype == torch.float32
    assert tuned.next_token_logits(ids).dtype == torch.float32
    assert spf.FastSoftPrompt(8, {"a": 2})["a"].dtype == torch.float32


def test_adapters_that_another_object_trains_get_no_gradient(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model: Any = peft.get_peft_model(build("llama"), config)
    other = spf.SoftPromptModel(model, train_adapters=True)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert adapters and all(adapter.requires_grad for adapter in adapters)
    compressed(tmp_path, model=model, steps=3)
    assert all(adapter.grad is None and adapter.requires_grad for adapter in adapters)
    assert other.base_model is model
