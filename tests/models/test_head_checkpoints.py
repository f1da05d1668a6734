"""A checkpoint of Trainer holds prompts, the head and adapters; it brings them back, and nothing else of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support.tiny_models import LLAMA, build

import softprompt_fast as spf

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))


def write_checkpoint(tuned: spf.SoftPromptModel, folder: Path, **added: torch.Tensor) -> None:
    """The file that Trainer writes."""
    folder.mkdir(exist_ok=True)
    state = {key: value.clone() for key, value in (tuned.state_dict() | added).items()}
    save_file(state, folder / "model.safetensors")


def trained_head(model: Any, **options: Any) -> spf.SoftPromptModel:
    """A model whose head, adapters and prompt are not those that it began with."""
    tuned = spf.SoftPromptModel(model, train_head=True, **options).eval()
    tuned.add_prompt("p", 3, seed=0)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return tuned


def test_a_head_inside_a_peft_model_comes_back_and_is_saved_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    build("llama", head="SequenceClassification").save_pretrained(tmp_path / "base")

    def base() -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
        return peft.get_peft_model(model, config).eval()

    tuned = trained_head(base(), train_adapters=True)
    expected = tuned(IDS).logits
    write_checkpoint(tuned, tmp_path / "checkpoint")
    again = spf.SoftPromptModel.from_pretrained(base(), tmp_path / "checkpoint", train_adapters=True).eval()
    assert torch.equal(again(IDS).logits, expected)
    assert again.trains_head and again.saves_head
    again.save_pretrained(tmp_path / "prompts")
    saved = load_file(tmp_path / "prompts" / "p" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.score.weight"], tuned.base_model.base_model.model.score.weight)


def test_a_checkpoint_holds_a_frozen_head_that_came_with_a_prompt(tmp_path: Path) -> None:
    tuned = trained_head(build("llama", head="SequenceClassification"))
    expected = tuned(IDS).logits
    tuned.save_pretrained(tmp_path / "first")
    base = build("llama", head="SequenceClassification")
    frozen = spf.SoftPromptModel.from_pretrained(base, tmp_path / "first", train_head=False)
    assert "base_model.score.weight" in frozen.state_dict()
    write_checkpoint(frozen, tmp_path / "second")
    base = build("llama", head="SequenceClassification")
    again = spf.SoftPromptModel.from_pretrained(base, tmp_path / "second", train_head=False).eval()
    assert torch.equal(again(IDS).logits, expected)
    assert again.saves_head and not again.trains_head


def test_a_frozen_head_of_the_base_stays_out_of_checkpoints() -> None:
    tuned = spf.SoftPromptModel(build("llama", head="SequenceClassification"), train_head=False)
    tuned.add_prompt("p", 3)
    assert all(key.startswith("prompts.") for key in tuned.state_dict())


def test_a_checkpoint_does_not_replace_weights_of_the_base(tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)))
    tuned.add_prompt("p", 3)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tuned.base_model.get_parameter(name)
    write_checkpoint(tuned, tmp_path, **{f"base_model.{name}": torch.zeros_like(weight)})
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    with pytest.raises(
        ValueError, match=rf"must hold prompts, adapters and the weights of a head, got 'base_model\.{name}'"
    ):
        spf.SoftPromptModel.from_pretrained(base, tmp_path)
    assert base.get_parameter(name).any()
