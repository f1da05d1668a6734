"""Deep prompts whose first positions are not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.peft_models import IDS, RIGHT, base_model, peft_model
from support.tiny_reviews import reviews, tiny_tokenizer
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.prompts import fold
from softprompt_fast.prompts.peft_files import frozen_tokens, peft_type
from softprompt_fast.prompts.placement import freeze_first, frozen_count
from softprompt_fast.tasks.task import classification_task
from softprompt_fast.tuning.job import TuningJob
from softprompt_fast.tuning.run import tune, tune_tasks

peft = pytest.importorskip("peft")

LABELS = IDS.masked_fill(RIGHT == 0, -100)


def deep_model(frozen: int = 2, name: str = "llama") -> spf.DeepPromptModel:
    tuned = spf.DeepPromptModel(base_model(name))
    values = torch.randn(5, tuned.prompts.embedding_dim, generator=torch.Generator().manual_seed(3)) * 0.4
    tuned.add_prompt("mine", init=values, num_frozen_tokens=frozen)
    return tuned


def train(tuned: spf.DeepPromptModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(tuned.prompts.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(IDS, RIGHT, labels=LABELS, prompt_ids="mine").loss.backward()
        optimizer.step()


@pytest.mark.parametrize("frozen", [1, 2, 5])
def test_they_do_not_move(frozen: int) -> None:
    tuned = deep_model(frozen)
    before = tuned.prompts.snapshot("mine")
    train(tuned)
    after = tuned.prompts.snapshot("mine")
    assert torch.equal(after[:frozen], before[:frozen])
    assert not (after[frozen:] == before[frozen:]).any()


def test_their_gradient_is_zero_and_that_of_others_is_as_without() -> None:
    tuned, free = deep_model(2), deep_model(0)
    for model in (tuned, free):
        model(IDS, RIGHT, labels=LABELS, prompt_ids="mine").loss.backward()
    got = tuned.prompts.forms("mine").original.grad
    expected = free.prompts["mine"].grad
    assert not got[:2].any() and expected[:2].any() and torch.equal(got[2:], expected[2:])
    assert next(iter(tuned.prompts.parameters())) is tuned.prompts.forms("mine").original


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_that_of_peft(name: str, tmp_path: Path) -> None:
    theirs = peft_model(name, kind="Cartridge", num_frozen_tokens=2)
    theirs.save_pretrained(tmp_path / "mine")
    tuned = spf.DeepPromptModel(base_model(name))
    tuned.load_prompt(tmp_path / "mine")
    assert frozen_count(tuned.prompts, "mine") == 2
    train(tuned, 2)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        logits = theirs(input_ids=IDS, attention_mask=RIGHT).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS[:, 1:].flatten()).backward()
        optimizer.step()
    assert torch.allclose(tuned.prompts.snapshot("mine"), theirs.prompt_encoder["default"].weight, atol=1e-4)


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    tuned = deep_model(2)
    train(tuned)
    tuned.save_pretrained(tmp_path / "sink")
    tuned.save_pretrained(tmp_path / "none", peft_type="PREFIX_TUNING")
    folders = [tmp_path / kind / "mine" for kind in ("sink", "none")]
    assert [peft_type(folder) for folder in folders] == ["CARTRIDGE", "PREFIX_TUNING"]
    assert [frozen_tokens(folder) for folder in folders] == [2, 0]
    again = spf.DeepPromptModel.from_pretrained(base_model("llama"), tmp_path / "sink")
    assert frozen_count(again.prompts, "mine") == 2
    assert torch.equal(again.prompts["mine"], tuned.prompts["mine"])
    before = again.prompts.snapshot("mine")
    train(again)
    assert torch.equal(again.prompts["mine"][:2], before[:2]) and not torch.equal(again.prompts["mine"], before)
    copy = again.add_prompt("copy", init=folders[0])  # values alone
    assert torch.equal(copy, tuned.prompts["mine"]) and frozen_count(again.prompts, "copy") == 0
    theirs = peft.PeftModel.from_pretrained(base_model("llama"), folders[0])
    assert theirs.prompt_encoder["default"].num_frozen_tokens == 2
    assert torch.equal(theirs.prompt_encoder["default"].frozen_embedding, tuned.prompts["mine"][:2])


def test_a_prompt_without_them_can_be_a_cartridge_too(tmp_path: Path) -> None:
    deep_model(0).save_pretrained(tmp_path, peft_type="CARTRIDGE")
    assert frozen_tokens(tmp_path / "mine") == 0 and peft_type(tmp_path / "mine") == "CARTRIDGE"
    tuned = spf.DeepPromptModel.from_pretrained(base_model("llama"), tmp_path)
    assert frozen_count(tuned.prompts, "mine") == 0


def test_a_state_dict_keeps_them() -> None:
    tuned = deep_model(2)
    tuned.add_prompt("other", init=tuned.prompts.snapshot("mine"))
    train(tuned)
    fresh = spf.DeepPromptModel(base_model("llama"))
    fresh.load_state_dict(tuned.state_dict())
    assert sorted(fresh.prompts.names) == ["mine", "other"]
    assert [frozen_count(fresh.prompts, name) for name in ("mine", "other")] == [2, 0]
    assert torch.equal(fresh.prompts["mine"], tuned.prompts["mine"])
    train(tuned)
    tuned.load_state_dict(fresh.state_dict())
    assert torch.equal(fresh.prompts["mine"], tuned.prompts["mine"])


def test_a_checkpoint_of_trainer_keeps_them(tmp_path: Path) -> None:
    tuned = deep_model(2)
    before = tuned.prompts.snapshot("mine")
    rows = [{"input_ids": IDS[i], "labels": IDS[i]} for i in range(4)]
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, weight_decay=0.5, learning_rate=0.05
    )
    tf.Trainer(tuned, arguments, train_dataset=rows).train()
    assert torch.equal(tuned.prompts["mine"][:2], before[:2]) and not torch.equal(tuned.prompts["mine"], before)
    again = spf.DeepPromptModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-2")
    assert torch.equal(again.prompts["mine"], tuned.prompts["mine"]) and frozen_count(again.prompts, "mine") == 2
    named = spf.DeepPromptModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-2", names=["mine"])
    assert named.prompts.names == ["mine"]


def test_positions_are_fixed_once() -> None:
    tuned = deep_model(2)
    original = tuned.prompts.forms("mine").original
    assert freeze_first(tuned.prompts, "mine", 1) is original and freeze_first(tuned.prompts, "mine", 2) is original
    assert frozen_count(tuned.prompts, "mine") == 2 and len(tuned.prompts.forms("mine")) == 1
    freeze_first(tuned.prompts, "mine", 3)
    before = tuned.prompts.snapshot("mine")
    train(tuned)
    assert frozen_count(tuned.prompts, "mine") == 3 and torch.equal(tuned.prompts["mine"][:3], before[:3])


def test_the_bank_treats_them_as_any_prompt() -> None:
    tuned = deep_model(2)
    values = tuned.prompts.snapshot("mine")
    ids = IDS[:, :4]
    expected: Tensor = tuned(ids, prompt_ids="mine").logits
    tuned.prompts.rename_prompt("mine", "new")
    assert frozen_count(tuned.prompts, "new") == 2 and torch.equal(tuned(ids, prompt_ids="new").logits, expected)
    tuned.prompts.freeze_prompt("new")
    assert not any(parameter.requires_grad for parameter in tuned.prompts.parameters())
    tuned.prompts.freeze_prompt("new", frozen=False)
    generated = tuned.generate(ids, prompt_ids="new", max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (4, 7)
    assert torch.equal(fold(tuned.prompts, "new"), values) and frozen_count(tuned.prompts, "new") == 0
    tuned.remove_prompt("new")
    assert tuned.prompts.names == []


# --- tuning runs ---


def tune_deep(folder: Path, tuned: spf.DeepPromptModel, **options: Any) -> Any:
    task = classification_task(reviews(), prompt="p")
    settings = {"steps": 4, "eval_every": 2, "learning_rate": 0.1, "num_virtual_tokens": 5, "num_frozen_tokens": 2}
    return tune(tuned, tiny_tokenizer(), task, reviews(16), reviews(8), folder, **settings | options)


@pytest.mark.parametrize(
    "form",
    [{}, {"reparameterization": "residual"}, {"reparameterization": "low-rank", "rank": 2}, {"decay_to_initial": 0.5}],
    ids=["plain", "residual", "low-rank", "decay"],
)
def test_a_tuning_run_keeps_them(form: dict[str, Any], tmp_path: Path) -> None:
    tuned, start = spf.DeepPromptModel(base_model("llama")), spf.DeepPromptModel(base_model("llama"))
    values = start.add_prompt("p", 5, init="vocabulary", seed=0).detach()
    result = tune_deep(tmp_path / "run", tuned, init="vocabulary", init_noise=0.1, seed=0, **form)
    got = tuned.prompts["p"]
    assert torch.equal(got[:2], values[:2]) and not torch.equal(got[2:], values[2:])
    assert tuned.prompts.forms("p") is None and frozen_tokens(result.folder) == 2
    if not form:
        assert result.trainable_parameters == 3 * tuned.prompts.embedding_dim
    more = spf.DeepPromptModel.from_pretrained(base_model("llama"), result.folder)
    assert torch.equal(more.prompts["p"], got)
    again = tune_deep(tmp_path / "more", more, num_frozen_tokens=0, **form)  # the prompt is in the model already
    assert torch.equal(more.prompts["p"][:2], values[:2]) and not torch.equal(more.prompts["p"], got)
    assert frozen_tokens(again.folder) == 2


def test_tuning_runs_that_cannot_keep_them_are_refused(tmp_path: Path) -> None:
    deep = spf.DeepPromptModel(base_model("llama"))
    with pytest.raises(ValueError, match="`num_frozen_tokens` must be 0 to 5, the prompt's length, got 6"):
        tune_deep(tmp_path, deep, num_frozen_tokens=6)
    with pytest.raises(ValueError, match="`num_frozen_tokens` must be an integer from 0, got -1"):
        tune_deep(tmp_path, deep, num_frozen_tokens=-1)
    with pytest.raises(ValueError, match="`num_frozen_tokens` must be 0 unless prompts are deep, got 2"):
        tune_deep(tmp_path, spf.SoftPromptModel(base_model("llama")))
    job = TuningJob(classification_task(reviews(), prompt="p"), reviews(), reviews(8))
    with pytest.raises(ValueError, match="`shared_tokens` cannot be combined with `num_frozen_tokens`"):
        tune_tasks(deep, tiny_tokenizer(), [job], tmp_path, shared_tokens=2, num_frozen_tokens=1)
    assert deep.prompts.names == []


# --- errors ---


@pytest.mark.parametrize("count", [-1, 6, 1.0, True, None])
def test_impossible_numbers_are_refused(count: Any) -> None:
    tuned = spf.DeepPromptModel(base_model("llama"))
    with pytest.raises(ValueError, match=r"`num_frozen_tokens` must be 0 to 5, the prompt's length, got"):
        tuned.add_prompt("mine", 5, num_frozen_tokens=count)
    assert tuned.prompts.names == []


def test_a_folder_with_an_impossible_number_is_refused(tmp_path: Path) -> None:
    deep_model(2).save_pretrained(tmp_path)
    file = tmp_path / "mine" / "adapter_config.json"
    for written, message in (("6", "must be at most 5, got 6"), ('"2"', "must be a number from 0, got '2'")):
        text = file.read_text()
        file.write_text(text.replace('"num_frozen_tokens": 2', f'"num_frozen_tokens": {written}'))
        with pytest.raises(ValueError, match=f"`num_frozen_tokens` {message}"):
            spf.DeepPromptModel.from_pretrained(base_model("llama"), tmp_path)
        file.write_text(text)
