"""Tuning a prompt with the model's head: the best head is kept, its parameters have their own learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_heads import HEADS, plain_tokenizer, questions, save_model, tagged
from support.tiny_models import build
from support.tiny_reviews import reviews
from transformers import AutoModel

import softprompt_fast as spf
from softprompt_fast.evaluation import evaluate, predict
from softprompt_fast.hf import load_model_with_head
from softprompt_fast.inference import PromptBank, SoftPromptPipeline
from softprompt_fast.tasks import answering_task, sequence_task, tagging_task
from softprompt_fast.tuning.best import BestPrompts
from softprompt_fast.tuning.objective import HeadLoss
from softprompt_fast.tuning.run import tune, tune_tasks

COMMON: dict[str, Any] = {"batch_size": 16, "num_virtual_tokens": 4, "steps": 4, "eval_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), "encoder")


def with_head(folder: Path, task: Any, **options: Any) -> tuple[spf.SoftPromptModel, Any]:
    loaded = load_model_with_head(str(folder), task.head.name, task.labels, "float32", "cpu")
    return spf.SoftPromptModel(loaded.model, **{"train_head": loaded.fresh} | options), loaded.tokenizer


def classifier(model: spf.SoftPromptModel) -> torch.Tensor:
    return model.base_model.classifier.weight.detach().clone()


def test_the_best_prompt_and_head_are_restored_together(folder: Path, tmp_path: Path) -> None:
    model, _ = with_head(folder, sequence_task(reviews()))
    model.add_prompt("p", 3)
    best = BestPrompts(model, tmp_path)
    good = model.prompts.snapshot("p").clone(), classifier(model)
    assert best.update("p", {"loss": 1.0}, 1)
    with torch.no_grad():
        model.prompts["p"].add_(1)
        model.base_model.classifier.weight.add_(1)
    assert not best.update("p", {"loss": 2.0}, 2)
    assert best.restore("p") == {"loss": 1.0}
    assert torch.equal(model.prompts.snapshot("p"), good[0]) and torch.equal(classifier(model), good[1])


def test_a_new_head_is_trained_at_its_own_rate_and_a_frozen_one_stays(folder: Path, tmp_path: Path) -> None:
    task = sequence_task(reviews())
    changes = {}
    for number, (rate, trained) in enumerate([(1e-2, True), (1e-5, True), (1e-2, False)]):
        model, tokenizer = with_head(folder, task, train_head=trained)
        before = classifier(model)
        output = tmp_path / str(number)
        result = tune(model, tokenizer, task, reviews(), reviews(8), output, head_learning_rate=rate, **COMMON)
        changes[rate, trained] = (classifier(model) - before).abs().max().item()
        assert (result.trainable_parameters > 4 * 32) == trained
    assert changes[1e-2, False] == 0
    assert 1e-4 > changes[1e-5, True] > 0 and changes[1e-2, True] > 5e-3


def test_a_pipeline_gives_the_answers_of_predict(folder: Path, tmp_path: Path) -> None:
    task = sequence_task(reviews())
    model, tokenizer = with_head(folder, task)
    result = tune(model, tokenizer, task, reviews(), reviews(8), tmp_path, head_learning_rate=0.1, **COMMON)
    expected = predict(model, tokenizer, task, reviews(8))
    bank = PromptBank(load_model_with_head(str(folder), HEADS[0], task.labels, "float32", "cpu").model)
    bank.add("prompt", result.folder)
    for got, answer in zip(SoftPromptPipeline(bank, tokenizer).classify(reviews(8), "prompt"), expected, strict=True):
        assert got["prediction"] == answer["prediction"]
        assert got["scores"] == pytest.approx(answer["scores"], abs=1e-5)


def test_a_head_is_the_same_whenever_it_is_loaded_and_in_float32(folder: Path) -> None:
    def load(dtype: str) -> Any:
        torch.rand(3)  # the state of the random numbers does not matter, and is not changed
        state = torch.get_rng_state()
        loaded = load_model_with_head(str(folder), "token-classification", ["a", "b", "c"], dtype, "cpu")
        assert torch.equal(state, torch.get_rng_state()) and loaded.fresh
        return loaded.model

    one, two, low = load("float32"), load("float32"), load("bfloat16")
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert low.dtype == torch.bfloat16 and low.classifier.weight.dtype == torch.float32
    ids = torch.arange(4, 10)[None]
    assert low(ids).logits.dtype == torch.float32 and low.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_has_the_checkpoints_backbone(kind: str, head: str, tmp_path: Path) -> None:
    """transformers gives LlamaForQuestionAnswering a random backbone if the checkpoint is of a language model."""
    base = save_model(tmp_path, kind)
    loaded = load_model_with_head(str(base), head, [] if head == HEADS[2] else ["a", "b"], "float32", "cpu")
    expected = AutoModel.from_pretrained(base).state_dict()
    own = loaded.model.base_model.state_dict()
    assert loaded.fresh and own and all(torch.equal(own[name], expected[name]) for name in own)


def test_what_cannot_be_loaded_with_a_head(tmp_path: Path) -> None:
    build("phi3").save_pretrained(tmp_path / "phi3")
    plain_tokenizer().save_pretrained(tmp_path / "phi3")
    with pytest.raises(ValueError, match="`head` must be one that transformers has for phi3, got question-answering"):
        load_model_with_head(str(tmp_path / "phi3"), "question-answering", (), "float32", "cpu")
    build("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="`head` cannot be combined with encoder-decoders"):
        load_model_with_head(str(tmp_path / "t5"), "question-answering", (), "float32", "cpu")


@pytest.mark.parametrize(
    ("task", "rows"), [(tagging_task(tagged()), tagged(12)), (answering_task(), questions(12))], ids=["tags", "answers"]
)
def test_scores_do_not_depend_on_the_batch(folder: Path, task: Any, rows: list[dict[str, Any]]) -> None:
    model, tokenizer = with_head(folder, task)
    model.add_prompt("prompt", 3)
    whole = evaluate(model, tokenizer, task, rows, batch_size=32)
    assert evaluate(model, tokenizer, task, rows, batch_size=1) == pytest.approx(whole, abs=1e-5)
    answers = predict(model, tokenizer, task, rows, batch_size=5)
    alone = [predict(model, tokenizer, task, [row])[0] for row in rows]
    assert [a["prediction"] for a in answers] == [a["prediction"] for a in alone]


def test_the_loss_of_a_head_is_that_of_transformers(folder: Path) -> None:
    task = tagging_task(tagged())
    model, _ = with_head(folder, task)
    model.add_prompt("p", 3)
    ids, labels = torch.randint(4, 80, (3, 6)), torch.tensor([[0, 1, -100, 2, 3, 0]] * 3)
    expected = model(ids, labels=labels)
    assert torch.allclose(HeadLoss()(expected, labels), expected.loss, atol=1e-6)
    assert torch.allclose(HeadLoss()(expected, labels, 30), expected.loss / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "after_bos"}, "placement='after_bos' cannot be combined with a head"),
        ({"objective": "vocabulary"}, "`objective` vocabulary cannot be combined with a head"),
        ({"label_smoothing": 0.1}, "`label_smoothing` cannot be combined with the head question-answering"),
    ],
)
def test_settings_that_a_head_refuses(folder: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = answering_task()
    model, tokenizer = with_head(folder, task)
    with pytest.raises(ValueError, match=message):
        tune(model, tokenizer, task, questions(), questions(8), tmp_path, **COMMON | options)


def test_several_tasks_with_a_head_are_refused(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from softprompt_fast.tuning import TuningJob

    task = answering_task()
    model, tokenizer = with_head(folder, task)
    jobs = [TuningJob(replace(task, prompt=name), questions(), questions(8)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="a task with a head cannot be combined with other tasks in one run"):
        tune_tasks(model, tokenizer, jobs, tmp_path)
