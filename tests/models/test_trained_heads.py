"""A head is trained with the prompts if its weights are new or if that is asked for, and never frozen in silence."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.tiny_models import BERT, LLAMA, build

import softprompt_fast as spf

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 1, 0])


def wrapped(name: str = "bert", head: str = "SequenceClassification", **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build(name, head=head), **options)
    tuned.add_prompt("p", init=torch.randn(3, 32, generator=torch.Generator().manual_seed(2)))
    return tuned


def trained(tuned: Any) -> set[str]:
    return {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "softprompt_fast"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a model without a head for classification, and of one with it."""
    folder = tmp_path_factory.mktemp("models")
    tf.BertForMaskedLM(tf.BertConfig(**BERT)).save_pretrained(folder / "masked")
    tf.BertForSequenceClassification(tf.BertConfig(**BERT)).save_pretrained(folder / "classifier")
    tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).save_pretrained(folder / "causal")
    return folder


HEADS = {
    ("llama", "SequenceClassification"): ("score",),
    ("llama", "TokenClassification"): ("score",),
    ("llama", "QuestionAnswering"): ("qa_outputs",),
    ("gpt2", "TokenClassification"): ("classifier",),
    ("bert", "SequenceClassification"): ("classifier", "bert.pooler"),
    ("bert", "TokenClassification"): ("classifier",),
    ("roberta", "SequenceClassification"): ("classifier",),
    ("modernbert", "SequenceClassification"): ("head", "classifier"),
    ("electra", "QuestionAnswering"): ("qa_outputs",),
    ("llama", "CausalLM"): (),
    ("bert", "MaskedLM"): (),
    ("t5", "Seq2SeqLM"): (),
}


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_names_of_head_modules(name: str, head: str) -> None:
    tuned = spf.SoftPromptModel(build(name, head=head))
    assert tuned.head_modules == HEADS[name, head]
    assert tuned.trains_head is bool(HEADS[name, head])
    starts = tuple(f"{module}." for module in tuned.head_modules)
    assert {key.removeprefix("base_model.") for key in trained(tuned)} == {
        key for key, _ in tuned.base_model.named_parameters() if key.startswith(starts)
    }


def test_a_backbone_has_no_head() -> None:
    assert spf.SoftPromptModel(tf.BertModel(tf.BertConfig(**BERT))).head_modules == ()


def test_a_head_that_no_checkpoint_held_is_trained(checkpoints: Path) -> None:
    tuned = spf.SoftPromptModel(tf.BertForSequenceClassification.from_pretrained(checkpoints / "masked"))
    assert tuned.trains_head
    assert tuned.head_modules == ("classifier", "bert.pooler")
    tuned = spf.SoftPromptModel(tf.LlamaForSequenceClassification.from_pretrained(checkpoints / "causal"))
    assert (tuned.trains_head, tuned.head_modules) == (True, ("score",))
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    other = tf.BertForSequenceClassification.from_pretrained(checkpoints / "classifier", **options)
    tuned = spf.SoftPromptModel(other.double())
    assert tuned.trains_head
    assert tuned.head_modules == ("classifier",)


def test_a_head_of_a_checkpoint_is_frozen_unless_told(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    load = tf.BertForSequenceClassification.from_pretrained
    assert trained(spf.SoftPromptModel(load(checkpoints / "classifier"))) == set()
    tuned = spf.SoftPromptModel(load(checkpoints / "classifier"), train_head=True)
    assert trained(tuned) == {"base_model.classifier.weight", "base_model.classifier.bias"}
    assert trained(spf.SoftPromptModel(load(checkpoints / "masked"), train_head=False)) == set()
    assert not said(caplog)


def test_one_line_where_it_is_not_known_whether_a_head_was_trained(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(tf.BertForSequenceClassification.from_pretrained(checkpoints / "masked"))
    with caplog.at_level(logging.INFO, "softprompt_fast"):
        tuned = spf.SoftPromptModel(model)
    assert not tuned.trains_head
    (message,) = said(caplog)
    assert "the head of BertForSequenceClassification (classifier) is frozen" in message
    assert "train_head=True trains it" in message


def test_a_new_heads_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "softprompt_fast"):
        wrapped("llama")
    assert said(caplog) == [
        "the head of LlamaForSequenceClassification (score) has new weights and is trained with the prompts"
    ]


@pytest.mark.parametrize(("name", "head"), [(n, h) for n, h in HEADS if h.endswith(("Classification", "Answering"))])
def test_a_step_moves_the_head_and_the_prompt_and_nothing_else(name: str, head: str) -> None:
    tuned = wrapped(name, head)
    target: dict[str, Any] = {"labels": LABELS if head.startswith("Seq") else IDS % 2}
    if head == "QuestionAnswering":
        target = {"start_positions": LABELS, "end_positions": LABELS + 3}
    before = {key: value.clone() for key, value in tuned.named_parameters()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tuned.train()(IDS, **target).loss.backward()
    optimizer.step()
    moved = {key for key, value in tuned.named_parameters() if not torch.equal(value, before[key])}
    assert trained(tuned) - moved <= {"base_model.qa_outputs.bias"}  # the same number for all tokens changes nothing
    assert moved <= trained(tuned)
    assert set(tuned.state_dict()) == trained(tuned)


def test_a_state_dict_brings_the_head_back() -> None:
    first, second = wrapped("llama"), wrapped("llama")
    with torch.no_grad():
        first.base_model.score.weight.add_(1.0)
    expected = first(IDS).logits
    assert not torch.equal(second(IDS).logits, expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(IDS).logits, expected)


def test_trainer_saves_and_resumes_the_head(tmp_path: Path) -> None:
    def trainer(tuned: Any) -> Any:
        settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
        arguments = tf.TrainingArguments(str(tmp_path), max_steps=4, learning_rate=0.1, **settings)
        rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)]
        return tf.Trainer(tuned, arguments, train_dataset=rows)

    whole, resumed = wrapped("llama"), wrapped("llama")
    before = resumed.base_model.score.weight.clone()
    trainer(whole).train()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not torch.equal(resumed.base_model.score.weight, before)
    assert set(resumed.state_dict()) == set(whole.state_dict()) == trained(whole)
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key])


def test_another_object_over_the_model_does_not_freeze_a_head_that_is_trained() -> None:
    first = wrapped("llama", train_head=True)
    second = spf.SoftPromptModel(first.base_model, train_head=False)
    assert first.base_model.score.weight.requires_grad
    second.unload()
    assert first.base_model.score.weight.requires_grad
    assert not first.base_model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_unload_leaves_the_head_as_trainable_as_it_was() -> None:
    model = build("llama", head="SequenceClassification")
    model.score.weight.requires_grad_(False)
    tuned = spf.SoftPromptModel(model, train_head=True)
    assert model.score.weight.requires_grad
    tuned.unload()
    assert not model.score.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    model.score.weight.requires_grad_(True)
    spf.SoftPromptModel(model, train_head=True).unload()
    assert model.score.weight.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tuned: pickle.loads(pickle.dumps(tuned))])
def test_a_copy_trains_its_own_head(copied: Any) -> None:
    tuned = wrapped("llama")
    other = copied(tuned)
    assert trained(other) == trained(tuned)
    other(IDS, labels=LABELS).loss.backward()
    assert other.base_model.score.weight.grad is not None
    assert tuned.base_model.score.weight.grad is None
    other.unload()
    assert other.base_model.model.embed_tokens.weight.requires_grad


def test_a_head_cannot_be_trained_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="`train_head` cannot be True: LlamaForCausalLM has no head besides"):
        spf.SoftPromptModel(build("llama"), train_head=True)
    with pytest.raises(TypeError, match="`train_head` must be True, False or None, got 'yes'"):
        spf.SoftPromptModel(build("llama"), train_head="yes")  # type: ignore[arg-type]


def test_heads_that_peft_trains_are_left_to_it() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert", head="TokenClassification"), peft.LoraConfig(task_type="TOKEN_CLS"))
    assert spf.SoftPromptModel(model, train_adapters=True).head_modules == ()


def test_a_head_that_peft_would_train_is_not_frozen_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = peft.get_peft_model(build("llama", head="SequenceClassification"), config)
    tuned = spf.SoftPromptModel(model, train_adapters=True)
    assert any("score" in name for name in trained(tuned))
    tuned.unload()
    spf.SoftPromptModel(model, train_head=False).unload()
    assert not said(caplog)
    with pytest.raises(ValueError, match=r"PEFT trains the head of .* \(score\) by itself: give train_adapters=True"):
        spf.SoftPromptModel(model, train_head=True)
    assert not trained(spf.SoftPromptModel(model))
    (message,) = said(caplog)
    assert "(score) is frozen, because it is part of PEFT's adapter: train_adapters=True trains both" in message


def test_trainer_answers_questions(tmp_path: Path) -> None:
    tuned = wrapped("electra", "QuestionAnswering")
    names = ["start_positions", "end_positions"]
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = tf.TrainingArguments(str(tmp_path), max_steps=3, learning_rate=0.1, label_names=names, **settings)
    rows = [{"input_ids": row, "start_positions": 2, "end_positions": 4, "of_no_use": 1} for row in IDS]
    trainer = tf.Trainer(tuned, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    ends = {name: torch.full((4,), column) for name, column in zip(names, (2, 4), strict=True)}
    assert before == pytest.approx(tuned(IDS, **ends).loss.item(), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    start, end = trainer.predict(rows).predictions
    assert start.shape == end.shape == IDS.shape
