"""A head is saved with each prompt in PEFT's format, and loaded from our folders, PEFT's and Trainer's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.peft_models import TASKS, VIRTUAL, base_model
from support.serving import tiny_tokenizer
from support.tiny_models import BERT, build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank, SoftPromptPipeline

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
MODELS = [
    ("llama", "SequenceClassification"),
    ("bert", "SequenceClassification"),
    ("roberta", "SequenceClassification"),
    ("modernbert", "SequenceClassification"),
    ("llama", "TokenClassification"),
    ("bert", "TokenClassification"),
    ("modernbert", "TokenClassification"),
    ("llama", "QuestionAnswering"),
    ("electra", "QuestionAnswering"),
]


def tuned_head(name: str, head: str, seed: int = 2, **options: Any) -> spf.SoftPromptModel:
    """A model whose head and prompt are not those that others begin with."""
    tuned = spf.SoftPromptModel(base_model(name, head), **options).eval()
    numbers = torch.Generator().manual_seed(seed)
    tuned.add_prompt("p", init=torch.randn(VIRTUAL, 32, generator=numbers) * 0.5)
    with torch.no_grad():
        for parameter in tuned.base_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.3)
    return tuned


def answers(model: Any, *, skipped: int = 0) -> torch.Tensor:
    """Logits of rows without padding, of the columns of tokens."""
    output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    if output.get("start_logits") is not None:
        return torch.stack([output.start_logits, output.end_logits])[:, :, skipped:]
    return output.logits[:, skipped:] if output.logits.dim() == 3 else output.logits


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_peft_gives_the_logits_of_a_saved_head(name: str, head: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = tuned_head(name, head)
    tuned.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base_model(name, head), tmp_path / "p").eval()
    assert type(model).__name__ == f"PeftModelFor{head}"
    torch.testing.assert_close(answers(model, skipped=VIRTUAL), answers(tuned), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_a_head_that_peft_saved_is_loaded(name: str, head: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type=TASKS[head], num_virtual_tokens=VIRTUAL)
    model = peft.get_peft_model(base_model(name, head), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    model.save_pretrained(tmp_path / "p")
    tuned = spf.SoftPromptModel.from_pretrained(base_model(name, head), tmp_path).eval()
    torch.testing.assert_close(answers(tuned), answers(model, skipped=VIRTUAL), rtol=1e-5, atol=1e-5)
    later = spf.SoftPromptModel(base_model(name, head), train_head=False).eval()
    later.load_prompt(tmp_path / "p")
    assert torch.equal(answers(later), answers(tuned))


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_a_saved_head_is_loaded(name: str, head: str, tmp_path: Path) -> None:
    tuned = tuned_head(name, head)
    tuned.save_pretrained(tmp_path / "first")
    again = spf.SoftPromptModel.from_pretrained(base_model(name, head), tmp_path / "first", train_head=False).eval()
    assert torch.equal(answers(again), answers(tuned))
    again.save_pretrained(tmp_path / "second")  # a head that came with a prompt stays with it
    files = [tmp_path / folder / "p" / "adapter_model.safetensors" for folder in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_files_are_those_of_peft(tmp_path: Path) -> None:
    tuned_head("bert", "SequenceClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "bert.pooler"]
    assert config["task_type"] == "SEQ_CLS"
    with safe_open(tmp_path / "p" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {
            "prompt_embeddings",
            *(
                f"base_model.{name}.{kind}"
                for name in ("classifier", "bert.pooler.dense")
                for kind in ("weight", "bias")
            ),
        }


def test_a_frozen_head_is_not_saved(tmp_path: Path) -> None:
    tuned_head("llama", "SequenceClassification", train_head=False).save_pretrained(tmp_path)
    assert "modules_to_save" not in json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert set(load_file(tmp_path / "p" / "adapter_model.safetensors")) == {"prompt_embeddings"}


def test_a_head_that_came_with_a_prompt_is_trained_further_unless_told(tmp_path: Path) -> None:
    model = build("llama", head="SequenceClassification")
    model.save_pretrained(tmp_path / "model")
    load = tf.LlamaForSequenceClassification.from_pretrained
    tuned = spf.SoftPromptModel(load(tmp_path / "model"), train_head=True)
    tuned.add_prompt("p", 3)
    tuned.save_pretrained(tmp_path / "run")
    make = spf.SoftPromptModel.from_pretrained
    assert make(load(tmp_path / "model"), tmp_path / "run").trains_head
    assert not make(load(tmp_path / "model"), tmp_path / "run", train_head=False).trains_head


def test_a_model_has_one_head(tmp_path: Path) -> None:
    for seed, folder in ((2, "a"), (3, "b")):
        tuned_head("llama", "SequenceClassification", seed).save_pretrained(tmp_path / folder)
    other = tmp_path / "b" / "p"
    tuned = spf.SoftPromptModel(base_model("llama", "SequenceClassification"))
    tuned.load_prompt(tmp_path / "a" / "p", "first")
    before = tuned.base_model.score.weight.clone()
    tuned.load_prompt(tmp_path / "a" / "p", "same")
    with pytest.raises(
        ValueError, match=r"`score.weight` differs .* the prompts first, same use; a model has one head"
    ):
        tuned.load_prompt(other, "second")
    assert tuned.prompts.names == ["first", "same"]
    assert torch.equal(tuned.base_model.score.weight, before)
    tuned.load_prompt(other, "second", force=True)
    assert torch.equal(
        tuned.base_model.score.weight, load_file(other / "adapter_model.safetensors")["base_model.score.weight"]
    )


def test_a_head_of_another_size_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    tuned_head("bert", "TokenClassification").save_pretrained(tmp_path)
    config = tf.BertConfig(**BERT, num_labels=5)
    tuned = spf.SoftPromptModel(tf.BertForTokenClassification(config))
    with pytest.raises(
        ValueError, match=r"`classifier.\w+` must have shape \[5(, 32)?\] like the model's head, got \[2"
    ):
        tuned.load_prompt(tmp_path / "p", force=True)
    assert not tuned.prompts.names


def test_weights_that_are_not_the_heads_are_named_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned_head("llama", "SequenceClassification").save_pretrained(tmp_path)
    file = tmp_path / "p" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.norm.weight": torch.zeros(32)}, file)
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        tuned = spf.SoftPromptModel.from_pretrained(base_model("llama", "SequenceClassification"), tmp_path)
    (record,) = caplog.records
    assert "also holds ['base_model.model.norm.weight'], which belong to the model" in record.getMessage()
    assert tuned.base_model.model.norm.weight.all()


def test_a_checkpoint_of_trainer_brings_the_head(tmp_path: Path) -> None:
    tuned = tuned_head("bert", "TokenClassification")
    save_file({key: value.contiguous() for key, value in tuned.state_dict().items()}, tmp_path / "model.safetensors")
    again = spf.SoftPromptModel.from_pretrained(base_model("bert", "TokenClassification"), tmp_path).eval()
    assert torch.equal(answers(again), answers(tuned))


def test_pickled_heads_stay_refused(tmp_path: Path) -> None:
    tuned_head("llama", "SequenceClassification").save_pretrained(tmp_path)
    state = load_file(tmp_path / "p" / "adapter_model.safetensors")
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        spf.SoftPromptModel.from_pretrained(base_model("llama", "SequenceClassification"), tmp_path)


def test_a_prompt_fits_its_base_whatever_pooler_the_base_got(tmp_path: Path) -> None:
    tf.BertForMaskedLM(tf.BertConfig(**BERT)).save_pretrained(tmp_path / "masked")
    load = tf.BertForSequenceClassification.from_pretrained
    tuned = spf.SoftPromptModel(load(tmp_path / "masked")).eval()
    tuned.add_prompt("p", 3, seed=0)
    tuned.save_pretrained(tmp_path / "run")
    again = spf.SoftPromptModel.from_pretrained(load(tmp_path / "masked"), tmp_path / "run").eval()
    assert torch.equal(answers(again), answers(tuned))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_bank_serves_a_prompt_with_its_head(name: str, tmp_path: Path) -> None:
    for seed, folder in ((2, "a"), (3, "b")):
        tuned_head(name, "SequenceClassification", seed).save_pretrained(tmp_path / folder)
    bank = PromptBank(base_model(name, "SequenceClassification"))
    bank.add("p", tmp_path / "a" / "p")
    expected = tuned_head(name, "SequenceClassification")(IDS).logits
    with torch.no_grad(), bank.use(["p"] * 4) as view:
        torch.testing.assert_close(bank.model(IDS, prompt_ids=["p"] * 4, prompts=view.prompts).logits, expected)
    with pytest.raises(ValueError, match="a model has one head"):
        bank.add("q", tmp_path / "b" / "p")
    assert bank.names == ["p"]
    bank.add("p", tmp_path / "b" / "p", replace=True)
    with torch.no_grad(), bank.use(["p"] * 4) as view:
        assert not torch.allclose(bank.model(IDS, prompt_ids=["p"] * 4, prompts=view.prompts).logits, expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_pipeline_classifies_with_the_head(name: str, tmp_path: Path) -> None:
    tuned = tuned_head(name, "SequenceClassification")
    tuned.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    pipeline = SoftPromptPipeline(base_model(name, "SequenceClassification"), tokenizer)
    pipeline.bank.add("p", tmp_path / "p")
    texts = ["good film", "a bad film and more"]
    for text, answer in zip(texts, pipeline.classify(texts, prompts="p"), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = tuned(ids, prompt_ids="p").logits[0].softmax(0)
        torch.testing.assert_close(torch.tensor(list(answer["scores"].values())), expected, rtol=1e-4, atol=1e-5)
