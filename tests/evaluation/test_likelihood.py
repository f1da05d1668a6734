"""One scorer for every caller: exact probabilities, the same numbers everywhere, and a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison_cases import ANSWERS, LONG_WORDS, TASK
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.evaluation.ensembles import evaluate_ensemble
from softprompt_fast.evaluation.intervals import Z, mean_and_error, mean_interval, perplexity
from softprompt_fast.evaluation.likelihood import (
    CHUNK,
    ModelBackend,
    encode_rows,
    label_log_probabilities,
    log_probabilities,
    target_log_likelihoods,
)
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.evaluation.prompt_scoring import score_prompts
from softprompt_fast.evaluation.scores import RowScores, rank
from softprompt_fast.tasks.task import Task

TASKS = {"one-token": TASK, "several-tokens": LONG_WORDS, "generation": ANSWERS}


def tuned(architecture: str = "llama") -> spf.SoftPromptModel:
    model = spf.SoftPromptModel(build(architecture))
    generator = torch.Generator().manual_seed(0)
    for name, length in (("prompt", 3), ("other", 5)):
        model.add_prompt(name, init=torch.randn(length, model.prompts.embedding_dim, generator=generator))
    return model


@pytest.mark.parametrize("rows", [3, CHUNK + 5])
def test_log_probabilities_are_those_of_float64(rows: int) -> None:
    logits = 30 * torch.randn(rows, 50)
    places, tokens = [0, 2, 2, rows - 1], [4, 0, 49, 7]
    expected = logits.double().log_softmax(-1)[places, tokens]
    assert torch.allclose(log_probabilities(logits, places, tokens), expected, rtol=1e-14, atol=0)
    assert log_probabilities(logits[:0], [], []).shape == (0,)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
def test_a_words_probability_is_that_of_its_row_run_alone(architecture: str) -> None:
    model = tuned(architecture)
    backend = ModelBackend(model, "prompt")
    texts, words = [[4, 10, 7], [5], [6, 6, 8, 9, 11]], [[9], [8]]
    together = label_log_probabilities(backend, texts, words)
    long = target_log_likelihoods(backend, texts, [[9, 8, 7], [3], [5, 4]])
    for i, (text, target) in enumerate(zip(texts, [[9, 8, 7], [3], [5, 4]], strict=True)):
        alone = torch.cat([_logits_alone(model, text, word)[:1] for word in words]).double().log_softmax(-1)
        scores = alone[range(2), [word[0] for word in words]].log_softmax(-1)
        assert torch.allclose(together[i], scores, atol=1e-5)
        expected = _logits_alone(model, text, target).double().log_softmax(-1)[range(len(target)), target].sum()
        assert long[i] == pytest.approx(expected.item(), abs=1e-5)


def _logits_alone(model: spf.SoftPromptModel, text: list[int], target: list[int]) -> torch.Tensor:
    """[len(target), V], by the base model itself."""
    base = model.base_model
    ids = torch.tensor(text if base.config.is_encoder_decoder else text + target)
    inputs = torch.cat([model.prompts["prompt"], base.get_input_embeddings()(ids)])[None]
    with torch.no_grad():
        if base.config.is_encoder_decoder:
            return base(inputs_embeds=inputs, labels=torch.tensor([target])).logits[0]
        return base(inputs_embeds=inputs).logits[0, -len(target) - 1 : -1]


@pytest.mark.parametrize("kind", TASKS)
def test_evaluate_is_the_summary_of_row_scores(kind: str) -> None:
    model, tokenizer, rows = tuned(), tiny_tokenizer(), reviews(11)
    scores = evaluate(model, tokenizer, TASKS[kind], rows, batch_size=4)
    prompts = {"prompt": model.prompts["prompt"].detach()}
    summary = score_prompts(model, tokenizer, TASKS[kind], rows, prompts, batch_size=4)["prompt"].summary()
    own = {"macro_f1", "loss_low", "loss_high"}
    assert set(scores) ^ set(summary) == (own if kind != "generation" else own - {"macro_f1"})
    assert {k: v for k, v in scores.items() if k not in own} == pytest.approx(
        {k: v for k, v in summary.items() if k not in own}, abs=1e-6
    )


def test_macro_f1_is_that_of_the_predictions() -> None:
    from sklearn.metrics import f1_score

    model, rows = tuned(), reviews(11)
    predicted = [answer["prediction"] for answer in predict(model, tiny_tokenizer(), TASK, rows)]
    expected = f1_score([row["label"] for row in rows], predicted, average="macro")
    assert evaluate(model, tiny_tokenizer(), TASK, rows)["macro_f1"] == pytest.approx(expected)


def test_very_unlikely_labels_keep_a_finite_and_exact_loss() -> None:
    scores = RowScores.of_labels(torch.tensor([[0.0, -200.0]], dtype=torch.float64), torch.tensor([1]))
    assert scores.loss == 200.0 and scores.accuracy == 0.0


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit", "majority"])
def test_an_ensemble_of_one_prompt_scores_as_that_prompt(combine: str) -> None:
    model, rows = tuned(), reviews(11)
    one = evaluate(model, tiny_tokenizer(), TASK, rows, prompt="other")
    ensemble = evaluate_ensemble(model, tiny_tokenizer(), TASK, rows, ["other"], combine=combine)
    assert list(ensemble) == list(one)
    shared = [key for key in one if key != "loss" or combine != "majority"]  # a vote has no probabilities
    assert [ensemble[key] for key in shared] == pytest.approx([one[key] for key in shared])


def test_a_generation_task_has_no_ensemble() -> None:
    with pytest.raises(ValueError, match="`task` must be a classification task"):
        evaluate_ensemble(tuned(), tiny_tokenizer(), ANSWERS, reviews(3), ["prompt"])


# --- what the model looks like afterwards ---


def _evaluate(model: Any, task: Task, progress: Any) -> Any:
    return evaluate(model, tiny_tokenizer(), task, reviews(5), batch_size=2, progress=progress)


def _predict(model: Any, task: Task, progress: Any) -> Any:
    return predict(model, tiny_tokenizer(), task, reviews(5), batch_size=2, max_new_tokens=2, progress=progress)


def _score(model: Any, task: Task, progress: Any) -> Any:
    return score_prompts(model, tiny_tokenizer(), task, reviews(5), {"a": None}, batch_size=2, progress=progress)


@pytest.mark.parametrize("run", [_evaluate, _predict, _score])
@pytest.mark.parametrize("kind", ["one-token", "generation"])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_even_after_an_error(run: Callable[..., Any], kind: str, fails: bool) -> None:
    model = tuned().train()
    frozen = model.base_model.model.layers[0]
    frozen.eval()
    seen: list[bool] = []

    def progress(count: int) -> None:
        seen.append(model.training)
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run(model, TASKS[kind], progress)
    else:
        run(model, TASKS[kind], progress)
    assert seen and not any(seen)
    assert model.training and model.base_model.training and not frozen.training


# --- rows and numbers ---


def test_rows_are_checked_before_anything_runs() -> None:
    for function in (evaluate, lambda *args: score_prompts(*args, {"a": None})):
        with pytest.raises(ValueError, match="`rows` must hold at least one row, got none"):
            function(tuned(), tiny_tokenizer(), TASK, [])
        with pytest.raises(ValueError, match="label 'maybe' is not among the task's labels"):
            function(tuned(), tiny_tokenizer(), TASK, [*reviews(2), {"text": "film", "label": "maybe"}])


def test_encoded_rows() -> None:
    tokenizer = tiny_tokenizer()
    classes, answers = (encode_rows(task, reviews(4), tokenizer) for task in (TASK, ANSWERS))
    assert classes.truth is not None and classes.truth.tolist() == [TASK.labels.index(r["label"]) for r in reviews(4)]
    assert classes.words == [tokenizer(word).input_ids for word in TASK.label_words.values()]
    assert classes.lengths == [len(text) for text in classes.texts] and not classes.targets
    assert answers.truth is None and answers.weights.tolist() == [2.0] * 4  # the word and the end
    assert answers.lengths == [len(text) + 2 for text in answers.texts]


def test_mean_error_and_perplexity() -> None:
    sums = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    mean, error = mean_and_error(sums, torch.ones(4))
    assert (mean, error) == pytest.approx((3.0, sums.std().item() / 2))
    assert mean_interval(sums, torch.ones(4)) == pytest.approx((mean - Z * error, mean + Z * error))
    assert perplexity(2.0) == math.exp(2.0) and math.isfinite(perplexity(1e9))


def test_ranks() -> None:
    better, worse = {"accuracy": 0.9, "loss": 2.0}, {"accuracy": 0.8, "loss": 1.0}
    assert rank(better, "accuracy") > rank(worse, "accuracy") and rank(better, "loss") < rank(worse, "loss")
    assert rank({"loss": 1.0}, "accuracy") > rank({"loss": 2.0}, "accuracy")
