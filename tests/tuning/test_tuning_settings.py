"""What each setting of tuning does, on a tiny model: each test fails if its setting did nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import batch, build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.models.deep_prompt_model import DeepPromptModel
from softprompt_fast.prompts.placement import bos_vector
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.best import BestPrompts
from softprompt_fast.tuning.job import TuningResult
from softprompt_fast.tuning.objective import LabelLoss, LabelWordsLoss, MixedLoss, VocabularyLoss, choose_loss
from softprompt_fast.tuning.prompt_setup import mean_norm
from softprompt_fast.tuning.run import tune
from softprompt_fast.tuning.settings import TuningSettings, instruction

Tuned = tuple[spf.SoftPromptModel, TuningResult]


def tuned_with(folder: Path, deep: bool = False, rows: int = 64, **settings: Any) -> Tuned:
    model = (DeepPromptModel if deep else spf.SoftPromptModel)(build("llama"))
    task = classification_task(reviews(), prompt="p")
    settings = {"steps": 12, "batch_size": 16, "learning_rate": 0.1, "num_virtual_tokens": 4} | settings
    if deep:
        settings["init"] = "vocabulary"
    result = tune(model, tiny_tokenizer(), task, reviews(rows), reviews(24), folder, **settings)
    return model, result


# --- the loss ---


def test_the_label_loss_is_cross_entropy_among_the_label_words() -> None:
    logits, targets = torch.randn(5, 30), torch.tensor([7, 3, -100, 7, 3])
    chosen = logits[:, [3, 7]].log_softmax(-1)
    expected = -(chosen[0, 1] + chosen[1, 0] + chosen[3, 1] + chosen[4, 0])
    loss = LabelLoss([3, 7])
    assert torch.allclose(loss(logits, targets), expected / 4)
    assert torch.allclose(loss(logits, targets, None, 8), expected / 8)
    smooth = LabelLoss([3, 7], 0.2)(logits, targets)
    spread = -chosen[[0, 1, 3, 4]].mean(-1).sum() / 4
    assert torch.allclose(smooth, 0.8 * expected / 4 + 0.2 * spread)


def test_mixed_tasks_have_each_their_own_loss() -> None:
    logits, targets, rows = torch.randn(4, 30), torch.tensor([7, 3, 5, 9]), torch.tensor([0, 2, 1, 1])
    mixed = MixedLoss([LabelLoss([3, 7]), VocabularyLoss()], [0, 1, 0])
    expected = LabelLoss([3, 7]).total(logits[:2], targets[:2], None) + VocabularyLoss().total(
        logits[2:], targets[2:], None
    )
    assert torch.allclose(mixed(logits, targets, rows), expected / 4)


@pytest.mark.parametrize("execution", ["shared", "padded"])
def test_a_models_loss_function_sees_the_answers_places(execution: str) -> None:
    tuned = spf.SoftPromptModel(build("llama", dtype=torch.float64), execution=execution)
    tuned.add_prompt("a", init=torch.randn(3, 32))
    ids, mask = batch()
    labels = torch.full_like(ids, -100)
    for row, column in ((0, 4), (0, 9), (2, 6), (3, 10)):
        labels[row, column] = ids[row, column]
    seen: list[Any] = []

    def loss(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, **items: Any) -> torch.Tensor:
        seen.append((logits, targets, rows, items))
        return VocabularyLoss()(logits.double(), targets, rows)

    every = tuned(ids, mask, prompt_ids="a").logits
    found = tuned(ids, mask, labels, "a", loss_function=loss, num_items_in_batch=4).loss
    real = mask.bool() & (labels != -100)
    expected = torch.stack(
        [-every[r, c - 1].log_softmax(-1)[labels[r, c]] for r, c in real.nonzero().tolist() if mask[r, c - 1]]
    )
    assert torch.allclose(found.double(), expected.mean(), atol=1e-6)
    _, targets, rows, items = seen[-1]
    kept = targets != -100
    assert rows[kept].tolist() == real.nonzero()[:, 0].tolist() and items == {"num_items_in_batch": 4}


def test_a_loss_function_is_refused_where_labels_are_no_tokens() -> None:
    tuned = spf.SoftPromptModel(build("llama", head="SequenceClassification"))
    tuned.add_prompt("a", init=torch.randn(3, 32))
    ids, mask = batch(padding="right")
    with pytest.raises(ValueError, match="`loss_function` cannot be given"):
        tuned(ids, mask, torch.tensor([0, 1, 0, 1]), "a", loss_function=VocabularyLoss())


def test_labels_are_compared_at_their_branches() -> None:
    tokenizer = tiny_tokenizer()
    one, several = (
        classification_task(reviews()),
        Task("classification", "{text}", "label", {"yes": " very fine", "no": " dull"}),
    )
    assert isinstance(choose_loss("labels", one, tokenizer), LabelLoss)
    for encoder_decoder in (False, True):
        loss = choose_loss("labels", several, tokenizer, encoder_decoder=encoder_decoder)
        assert isinstance(loss, LabelWordsLoss)
    for loss in (
        choose_loss("vocabulary", one, tokenizer),
        choose_loss("vocabulary", several, tokenizer),
        choose_loss("labels", one, tokenizer, encoder_decoder=True),
    ):
        assert isinstance(loss, VocabularyLoss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_words_is_that_of_each_branch(smoothing: float) -> None:
    end = 2
    words = [[9, 3, end], [9, 3, 4, end], [9, 5, 6, end], [9, 5, 6, 7]]
    allowed = {(9,): [3, 5], (9, 3): [end, 4], (9, 5, 6): [end, 7]}
    rows = torch.tensor([0] * 3 + [1] * 4 + [3] * 4 + [0])  # the last place is one without a target
    chosen = [words[0], words[1], words[3]]
    targets = torch.tensor([*(token for word in chosen for token in word), -100])
    logits = torch.randn(len(targets), 12, requires_grad=True)
    expected, at = torch.zeros(()), 0
    for word in chosen:
        for step, token in enumerate(word):
            if (among := allowed.get(tuple(word[:step]))) is not None:
                values = logits[at + step, among].log_softmax(-1)
                expected = expected - (1 - smoothing) * values[among.index(token)] - smoothing * values.mean()
        at += len(word)
    loss = LabelWordsLoss(words, smoothing)(logits, targets, rows)
    assert torch.allclose(loss, expected / 11)
    (got,), (wanted,) = (torch.autograd.grad(each, logits, retain_graph=True) for each in (loss, expected / 11))
    assert torch.allclose(got, wanted, atol=1e-7)
    after = torch.cat([targets[:3], torch.tensor([8]), targets[3:]])  # a token after a word, as encoder-decoders have
    more = LabelWordsLoss(words, smoothing).total(
        torch.cat([logits[:3], torch.randn(1, 12), logits[3:]]), after, torch.cat([rows[:3], rows[:1], rows[3:]])
    )
    assert torch.allclose(more, expected)


def test_the_objective_changes_what_is_learnt(tmp_path: Path) -> None:
    prompts = [tuned_with(tmp_path / o, objective=o)[0].prompts.snapshot("p") for o in ("labels", "vocabulary")]
    assert not torch.allclose(*prompts, atol=1e-3)


def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    # All rows in each step: their order does not matter.
    whole, parts = (
        tuned_with(tmp_path / str(n), rows=16, batch_size=16 // n, gradient_accumulation_steps=n, steps=3)[0]
        for n in (1, 2)
    )
    assert torch.allclose(whole.prompts.snapshot("p"), parts.prompts.snapshot("p"), atol=1e-4)


# --- forms and regularisation ---


@pytest.mark.parametrize("form", ["residual", "low-rank"])
@pytest.mark.parametrize("deep", [False, True])
def test_reparameterised_prompts_learn_and_are_saved_as_plain_ones(tmp_path: Path, form: str, deep: bool) -> None:
    model, result = tuned_with(
        tmp_path, deep, reparameterization=form, rank=2, steps=40, learning_rate=0.03 if deep else 0.1
    )
    assert result.after["loss"] < 0.5 * result.before["loss"]
    assert type(model.prompts) is spf.FastSoftPrompt
    again = type(model).from_pretrained(build("llama"), tmp_path, ["p"])
    assert torch.equal(again.prompts["p"].detach(), model.prompts["p"].detach())
    found = evaluate(again, tiny_tokenizer(), Task.load(result.folder), reviews(24))
    assert found["loss"] == pytest.approx(result.after["loss"], abs=1e-5)


def distance(folder: Path, **settings: Any) -> float:
    """From the first values, at the last step."""
    torch.manual_seed(0)
    start = torch.randn(4, 32) * 0.3
    model, _ = tuned_with(folder, init=start, num_virtual_tokens=None, steps=25, eval_every=25, **settings)
    return (model.prompts.snapshot("p") - start).norm().item()


def test_decay_keeps_the_prompt_near_its_start(tmp_path: Path) -> None:
    assert distance(tmp_path / "decay", decay_to_initial=1.0) < 0.8 * distance(tmp_path / "free")


def test_the_norm_bound_holds(tmp_path: Path) -> None:
    free, _ = tuned_with(tmp_path / "free", steps=20)
    bound = 0.9 * mean_norm(free)
    assert free.prompts.snapshot("p").norm(dim=1).max() > bound
    model, _ = tuned_with(tmp_path / "bound", steps=20, norm_bound=0.9)
    assert model.prompts.snapshot("p").norm(dim=1).max() <= bound * 1.0001


def test_dropout_changes_training_and_nothing_else(tmp_path: Path) -> None:
    plain, dropped = (tuned_with(tmp_path / str(p), prompt_dropout=p)[0] for p in (0.0, 0.5))
    assert not torch.allclose(plain.prompts.snapshot("p"), dropped.prompts.snapshot("p"), atol=1e-3)
    assert (dropped.prompts.snapshot("p") != 0).all()
    report = dropped.execution_report()
    assert report.execution == "shared" and report.checked["training"] < 1e-3


def test_smoothed_labels_give_less_certain_answers(tmp_path: Path) -> None:
    sure, unsure = (
        tuned_with(tmp_path / str(s), label_smoothing=s, steps=60, eval_every=60)[1].after for s in (0.0, 0.4)
    )
    assert sure["accuracy"] >= 0.9 and unsure["accuracy"] >= 0.9
    assert sure["loss"] < 0.1 < unsure["loss"]


def test_early_stopping_ends_a_run_that_gains_nothing(tmp_path: Path) -> None:
    _, result = tuned_with(tmp_path, learning_rate=1e-12, steps=50, eval_every=2, patience=3)
    assert result.steps == 8 and not result.interrupted  # the first evaluation is the best, three more without a gain


@pytest.mark.parametrize(("by", "best"), [("accuracy", 2), ("loss", 4)])
def test_the_best_state_is_kept_not_the_last(tmp_path: Path, by: str, best: int) -> None:
    model = spf.SoftPromptModel(build("llama"))
    parameter = model.add_prompt("p", init=torch.zeros(2, 32))
    states = BestPrompts(model, tmp_path, by)
    scores = [(0.5, 1.0), (0.8, 0.9), (0.8, 0.5), (0.8, 0.6), (0.7, 0.1), (0.6, 0.3)]
    for step, (accuracy, loss) in enumerate(scores):
        with torch.no_grad():
            parameter.fill_(step)
        states.update("p", {"accuracy": accuracy, "loss": loss}, step)
    again = BestPrompts(model, tmp_path, by)  # as after an interruption
    assert again.restore("p") == dict(zip(("accuracy", "loss"), scores[best], strict=True))
    assert (parameter == best).all() and again.entries["p"]["step"] == best
    assert not again.update("p", {"accuracy": 0.8, "loss": 0.5}, 9)


def test_a_token_update_is_trained_at_its_own_rate_and_saved(tmp_path: Path) -> None:
    slow, _ = tuned_with(tmp_path / "slow", token_update_rank=3, token_update_learning_rate=1e-9, steps=20)
    model, result = tuned_with(tmp_path / "fast", token_update_rank=3, token_update_learning_rate=0.05, steps=20)
    (_, b), (_, still) = model.prompts.token_update("p"), slow.prompts.token_update("p")
    assert b.shape == (3, 32) and b.abs().max() > 1e-2 and still.abs().max() < 1e-6
    again = spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path / "fast", ["p"])
    found = evaluate(again, tiny_tokenizer(), Task.load(result.folder), reviews(24))
    assert found["loss"] == pytest.approx(result.after["loss"], abs=1e-5)


# --- first values and place ---


def test_by_default_a_prompt_starts_as_an_instruction_that_names_the_labels(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model, _ = tuned_with(tmp_path, num_virtual_tokens=30, learning_rate=1e-12, steps=1)
    text = instruction({"no": " no", "yes": " yes"})
    assert "no or yes" in text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    expected = model.get_input_embeddings().weight[(ids * 30)[-30:] if len(ids) < 30 else ids[-30:]]
    ids = (ids * -(-30 // len(ids)))[-30:]
    expected = model.get_input_embeddings().weight[ids]
    assert torch.allclose(model.prompts.snapshot("p"), expected, atol=1e-6)


def test_a_prompt_starts_from_a_text(tmp_path: Path) -> None:
    options: dict[str, Any] = {"init": "text", "init_text": "film plot very", "num_virtual_tokens": 3}
    model, _ = tuned_with(tmp_path, learning_rate=1e-12, steps=1, **options)
    ids = tiny_tokenizer()("film plot very", add_special_tokens=False).input_ids
    assert torch.allclose(model.prompts.snapshot("p"), model.get_input_embeddings().weight[ids], atol=1e-6)
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert settings["init_text"] == "film plot very" and settings["init"] == "text"


def test_an_instruction_that_does_not_fit_gives_way_to_the_labels(tmp_path: Path) -> None:
    model, _ = tuned_with(tmp_path, num_virtual_tokens=3, learning_rate=1e-12, steps=1)
    ids = [tiny_tokenizer()(word).input_ids[0] for word in ("no", "yes")]
    assert torch.allclose(model.prompts.snapshot("p")[:2], model.get_input_embeddings().weight[ids], atol=1e-6)


def test_tuning_starts_from_another_tasks_prompt(tmp_path: Path) -> None:
    source, _ = tuned_with(tmp_path / "source", steps=30)
    model, result = tuned_with(
        tmp_path / "target", init=str(tmp_path / "source" / "p"), num_virtual_tokens=None, learning_rate=1e-12, steps=1
    )
    assert torch.allclose(model.prompts.snapshot("p"), source.prompts.snapshot("p"), atol=1e-6)
    assert result.after["accuracy"] > 0.9


def test_a_prompt_behind_bos_keeps_its_vector(tmp_path: Path) -> None:
    model, result = tuned_with(tmp_path, placement="after_bos", norm_bound=3.0)
    values = model.prompts.snapshot("p")
    assert values.shape == (5, 32) and torch.equal(values[0], bos_vector(model, tiny_tokenizer()))
    assert not Task.load(result.folder).special_tokens


@pytest.mark.parametrize("settings", [{"optimizer": "adafactor"}, {"schedule": "constant"}, {"schedule": "linear"}])
def test_optimisers_and_schedules_learn_each_its_own_way(tmp_path: Path, settings: dict[str, Any]) -> None:
    usual, _ = tuned_with(tmp_path / "usual", steps=40)
    other, result = tuned_with(tmp_path / "other", steps=40, **settings)
    assert result.after["loss"] < 0.6 * result.before["loss"]
    assert not torch.allclose(usual.prompts.snapshot("p"), other.prompts.snapshot("p"), atol=1e-3)


def test_epochs_count_passes_and_120_steps_are_the_default(tmp_path: Path) -> None:
    assert tuned_with(tmp_path / "a", steps=None, epochs=2)[1].steps == 8
    assert tuned_with(tmp_path / "b", steps=None)[1].steps == 120


def test_metrics_tell_settings_and_history(tmp_path: Path) -> None:
    _, result = tuned_with(tmp_path, init=torch.randn(4, 32), num_virtual_tokens=None, steps=10)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["init"] == "tensor [4, 32]" and metrics["settings"]["learning_rate"] == 0.1
    assert [point["step"] for point in metrics["history"]] == [2, 4, 6, 8, 10]
    seconds = [point["seconds"] for point in metrics["history"]]
    assert seconds == sorted(seconds) and seconds[-1] < result.tuning_seconds
    assert metrics["after"]["loss"] == min(point["loss"] for point in metrics["history"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4 * 32),
        ({"placement": "after_bos"}, 4 * 32),
        ({"reparameterization": "low-rank", "rank": 2}, 4 * 2 + 2 * 32),
        ({"reparameterization": "low-rank", "rank": 2, "placement": "after_bos"}, 4 * 2 + 2 * 32),
        ({"reparameterization": "residual", "bottleneck": 8}, 4 * 32 + 2 * 8 * 32 + 8 + 32 + 2 * 32),
    ],
)
def test_trained_numbers_are_counted_in_the_form_they_had(
    tmp_path: Path, settings: dict[str, Any], expected: int
) -> None:
    _, result = tuned_with(tmp_path, steps=1, **settings)
    assert result.trainable_parameters == expected
    assert json.loads((tmp_path / "metrics.json").read_text())["trainable_parameters"] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "mse"}, "`objective` must be one of labels, vocabulary, got 'mse'"),
        ({"optimizer": "sgd"}, "`optimizer` must be one of"),
        ({"schedule": "step"}, "`schedule` must be one of"),
        ({"reparameterization": "mlp"}, "`reparameterization` must be one of"),
        ({"placement": "middle"}, "`placement` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"steps": 0}, "`steps` must be a positive integer or None"),
        ({"steps": 3, "epochs": 1}, "`steps` cannot be combined with `epochs`"),
        ({"epochs": -1}, "`epochs` must be positive and finite or None"),
        ({"learning_rate": 0}, "`learning_rate` must be positive and finite"),
        ({"learning_rate": "high"}, "`learning_rate` must be positive and finite, got 'high'"),
        ({"label_smoothing": 1}, "`label_smoothing` must be at least 0 and below 1"),
        ({"prompt_dropout": -0.1}, "`prompt_dropout` must be at least 0 and below 1"),
        ({"norm_bound": 0}, "`norm_bound` must be positive and finite or None"),
        ({"decay_to_initial": -1}, "`decay_to_initial` must be 0 or more and finite"),
        ({"init": "text"}, "`init_text` must hold text"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuningSettings(**settings)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`lr` is not a setting of tuning, which has num_virtual_tokens"):
        tuned_with(tmp_path, lr=0.1)
