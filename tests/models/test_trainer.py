"""transformers' Trainer with a :class:`SoftPromptModel` as its model."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.rows_alone import relative, tuned_model
from support.serving import tiny_tokenizer
from support.tiny_models import build
from transformers.trainer_pt_utils import LabelSmoother

import softprompt_fast as spf

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([9, 5, 7, 9])
MASK = (torch.arange(9) < LENGTHS[:, None]).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


COUNTS_BEFORE = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
"""Whether Trainer counts a smoothed loss's targets in the labels as they were, with those of first tokens."""


def collate(rows: Any) -> dict[str, Any]:
    return {**BATCH, "prompt_ids": "long"}


def trainer(model: Any, folder: Path, trainer_class: Any = tf.Trainer, **options: Any) -> Any:
    more = {k: options.pop(k) for k in ("compute_metrics",) if k in options}
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 3, "save_strategy": "no"} | options
    kind = tf.Seq2SeqTrainingArguments if trainer_class is tf.Seq2SeqTrainer else tf.TrainingArguments
    return trainer_class(
        model,
        kind(str(folder), **settings),
        train_dataset=[{}] * 4,
        eval_dataset=[{}] * 4,
        data_collator=collate,
        **more,
    )


@pytest.mark.parametrize("kind", ["shared", "padded", "subclass", "deep"])
def test_label_smoothing_shifts_the_labels(tmp_path: Path, kind: str) -> None:
    if kind == "subclass":
        model = build("llama")
        model.__class__ = type("MyModel", (tf.LlamaForCausalLM,), {})
        tuned = spf.SoftPromptModel(model)
        tuned.add_prompt("long", 7, seed=0)
    else:
        tuned = deep_model("llama") if kind == "deep" else tuned_model("llama" if kind == "shared" else "bloom")
    loss = trainer(tuned, tmp_path, label_smoothing_factor=1e-9).evaluate()["eval_loss"]
    labels = BATCH["labels"].clone()
    labels[:, 0] = -100  # Trainer shifts the logits that it has: none of them predicts the first token
    expected = tuned(IDS, MASK, labels=labels, prompt_ids="long").loss.item()
    share = 26 / 30 if kind != "deep" and COUNTS_BEFORE else 1
    assert loss == pytest.approx(expected * share, rel=1e-4)


def test_the_loss_of_padding_on_the_left_and_one_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first token of a row with padding before it has logits of zeros in front of it."""
    tuned = tuned_model("llama")
    monkeypatch.setitem(BATCH, "attention_mask", MASK.flip(1))
    monkeypatch.setitem(BATCH, "labels", IDS.masked_fill(MASK.flip(1) == 0, -100))
    with caplog.at_level("WARNING", logger="softprompt_fast"):
        loss = trainer(tuned, tmp_path, label_smoothing_factor=1e-9).evaluate()["eval_loss"]
        trainer(tuned, tmp_path, label_smoothing_factor=1e-9).evaluate()
    assert sum("mask first tokens' labels" in message for message in caplog.messages) == 1
    labels = BATCH["labels"].clone()
    labels[torch.arange(4), 9 - LENGTHS] = -100
    alone = tuned(IDS, MASK.flip(1), labels=labels, prompt_ids="long").loss.item() * 26
    assert loss == pytest.approx((alone + 2 * math.log(96)) / (30 if COUNTS_BEFORE else 28), rel=1e-4)
    monkeypatch.setitem(BATCH, "labels", labels)
    losses = [trainer(tuned, tmp_path, label_smoothing_factor=f).evaluate()["eval_loss"] for f in (0.0, 1e-9)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["shared", "padded", "deep"])
def test_smoothing_by_nothing_is_the_loss_of_labels_after_the_first_token(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = BATCH["labels"].clone()
    labels[:, :3] = -100
    monkeypatch.setitem(BATCH, "labels", labels)
    tuned = deep_model("llama") if kind == "deep" else tuned_model("llama" if kind == "shared" else "bloom")
    losses = [trainer(tuned, tmp_path, label_smoothing_factor=f).evaluate()["eval_loss"] for f in (0.0, 1e-9)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_encoders_are_not_shifted(tmp_path: Path) -> None:
    tuned = tuned_model("bert")
    loss = trainer(tuned, tmp_path, label_smoothing_factor=1e-9).evaluate()["eval_loss"]
    expected = tuned(IDS, MASK, labels=BATCH["labels"], prompt_ids="long").loss.item()
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_smoothed_with_the_decoders_input(tmp_path: Path, name: str) -> None:
    tuned = tuned_model(name)
    collator = tf.DataCollatorForSeq2Seq(tiny_tokenizer(), model=tuned)
    rows = [{"input_ids": IDS[i, : 5 + i].tolist(), "labels": IDS[i, :4].tolist()} for i in range(3)]
    losses = []
    for factor in (0.0, 1e-9):
        instance = trainer(tuned, tmp_path, label_smoothing_factor=factor)
        instance.eval_dataset, instance.data_collator = rows, lambda batch: collator(batch) | {"prompt_ids": "long"}
        losses.append(instance.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not hasattr(tuned_model("llama"), "prepare_decoder_input_ids_from_labels")


@pytest.mark.parametrize("name", ["llama", "bloom", "bert", "deep"])
def test_metrics_and_predictions(tmp_path: Path, name: str) -> None:
    tuned = deep_model("llama") if name == "deep" else tuned_model(name)
    seen: list[Any] = []
    metrics = lambda result: seen.append(result) or {"answer": 42.0}  # noqa: E731
    instance = trainer(tuned, tmp_path, compute_metrics=metrics)
    assert instance.evaluate()["eval_answer"] == 42.0
    assert seen[0].predictions.shape == (4, 9, 96) and seen[0].label_ids.shape == (4, 9)
    predictions = instance.predict([{}] * 4).predictions
    expected = tuned(IDS, MASK, prompt_ids="long").logits
    assert relative(torch.from_numpy(predictions), expected) < 1e-5


def test_logits_are_for_evaluation(tmp_path: Path) -> None:
    tuned = tuned_model("llama").train()
    assert tuned(**collate(None)).logits is None
    assert tuned.eval()(**collate(None)).logits.shape == (4, 9, 96)
    assert tuned(**collate(None), return_logits=False).logits is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "t5", "deep"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    ends = []
    for option in ({}, {"gradient_checkpointing": True}):
        torch.manual_seed(0)
        tuned = deep_model("llama") if name == "deep" else tuned_model(name)
        instance = trainer(tuned, tmp_path, **option)
        instance.train()
        assert tuned.is_gradient_checkpointing is bool(option)
        ends.append(tuned.prompts["long"].detach().clone())
    assert relative(ends[1], ends[0]) < 1e-4


def test_neftune_noise(tmp_path: Path) -> None:
    ends = []
    for alpha in (None, 0.0, 5.0):
        torch.manual_seed(0)
        tuned = tuned_model("llama")
        trainer(tuned, tmp_path, neftune_noise_alpha=alpha).train()
        ends.append(tuned.prompts["long"].detach().clone())
    assert relative(ends[1], ends[0]) < 1e-4 and relative(ends[2], ends[0]) > 1e-4
    assert tuned.execution_report().execution == "shared"
    assert torch.equal(tuned(IDS, prompt_ids="long").logits, tuned(IDS, prompt_ids="long").logits)


@pytest.mark.parametrize("kind", ["plain", "deep"])
def test_checkpoints_hold_prompts_only(tmp_path: Path, kind: str) -> None:
    tuned = deep_model("llama") if kind == "deep" else tuned_model("llama")
    instance = trainer(tuned, tmp_path / "run")
    instance.train()
    instance.save_model(str(tmp_path / "final"))
    prompts = sum(p.numel() for p in tuned.prompts.parameters()) * 4
    assert (tmp_path / "final" / "model.safetensors").stat().st_size < prompts + 1000
    again = type(tuned).from_pretrained(build("llama"), tmp_path / "final")
    assert sorted(again.prompts.names) == ["long", "short"]
    assert torch.equal(again(IDS, MASK, prompt_ids="long").logits, tuned(IDS, MASK, prompt_ids="long").logits)
    one = type(tuned).from_pretrained(build("llama"), tmp_path / "final", names=["long"])
    assert one.prompts.names == ["long"]
    with pytest.raises(FileNotFoundError, match="has no prompt named none"):
        type(tuned).from_pretrained(build("llama"), tmp_path / "final", names=["none"])


def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for part in ("whole", "resumed"):
        torch.manual_seed(0)
        tuned = tuned_model("llama")
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        instance = trainer(tuned, tmp_path / "run", **options)
        instance.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if part == "resumed" else None)
        ends.append(tuned.prompts["long"].detach().clone())
    assert torch.equal(ends[0], ends[1])


def test_the_state_holds_what_is_trained() -> None:
    tuned = tuned_model("llama")
    assert set(tuned.state_dict()) == {"prompts.prompt_short", "prompts.prompt_long"}
    tuned.base_model.lm_head.weight.requires_grad_(True)
    assert "base_model.lm_head.weight" in tuned.state_dict()
    tuned.base_model.lm_head.weight.requires_grad_(False)
    other = tuned_model("llama")
    other.load_state_dict(tuned.state_dict())
    assert torch.equal(other.prompts["long"], tuned.prompts["long"])
    with pytest.raises(RuntimeError, match="prompt_long"):
        other.load_state_dict({"prompts.prompt_short": tuned.prompts["short"]})


def test_predict_with_generate(tmp_path: Path) -> None:
    tuned = tuned_model("t5")
    instance = trainer(tuned, tmp_path, tf.Seq2SeqTrainer, predict_with_generate=True, generation_max_length=6)
    predictions = torch.from_numpy(instance.predict([{}] * 4).predictions)
    expected = tuned.generate(IDS, MASK, "long", max_length=6)
    width = min(expected.shape[1], predictions.shape[1])
    assert torch.equal(predictions[:, :width], expected[:, :width])


def test_what_clients_read() -> None:
    tuned = tuned_model("llama")
    base = tuned.base_model
    assert tuned.generation_config is base.generation_config and tuned.can_generate()
    assert tuned.dtype == torch.float32 and tuned.name_or_path == base.name_or_path
    assert tuned.get_output_embeddings() is base.lm_head and tuned.get_base_model() is base
    prompts = 9 * 32
    assert tuned.num_parameters() == base.num_parameters() + prompts
    assert tuned.num_parameters(only_trainable=True) == prompts
    assert repr(tuned).startswith("SoftPromptModel(")
