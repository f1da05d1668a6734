"""Scores of several prompts in mixed batches, row by row."""

from __future__ import annotations

import pytest
import torch
from support.analysis_cases import TASKS, tuned_on
from support.tiny_reviews import reviews, tiny_tokenizer

from softprompt_fast.evaluation.intervals import mean_interval
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.evaluation.prompt_scoring import score_prompts
from softprompt_fast.tasks.examples import usable_rows


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("kind", TASKS)
def test_mixed_batches_score_every_prompt_as_evaluate_does(architecture: str, kind: str) -> None:
    prompts = {"a": torch.randn(3, 32), "b": torch.randn(5, 32), "none": None, "empty": torch.empty(0, 32)}
    rows, task, tokenizer = reviews(10), TASKS[kind], tiny_tokenizer()
    found = score_prompts(tuned_on(architecture), tokenizer, task, rows, prompts, batch_size=7)
    for name, values in prompts.items():
        alone = tuned_on(architecture) if values is None or len(values) == 0 else tuned_on(architecture, p=values)
        expected = evaluate(alone, tokenizer, task, rows)
        summary = found[name].summary()
        assert summary["loss"] == pytest.approx(expected["loss"], abs=1e-4), name
        shared = {key: expected[key] for key in expected if key in summary}
        assert {"rows", "perplexity" if kind == "generation" else "accuracy_low"} <= set(shared)
        assert {key: summary[key] for key in shared} == pytest.approx(shared, rel=1e-3), name
    assert found["none"].loss == pytest.approx(found["empty"].loss) != pytest.approx(found["a"].loss)


def test_scores_keep_the_model_as_it_was_and_report_progress() -> None:
    tuned, done = tuned_on(p=torch.randn(3, 32)).train(), []
    score_prompts(tuned, tiny_tokenizer(), TASKS["one-token"], reviews(5), {"a": None, "b": None}, progress=done.append)
    assert tuned.training and sum(done) == 10 and tuned.prompts.names == ["p"]


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    low, high = mean_interval(values, torch.ones(4))
    half = 1.959964 * values.std().item() / 2
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    wide = mean_interval(values, torch.tensor([1.0, 2.0, 4.0, 5.0]))
    assert wide == pytest.approx((1.0, 1.0))  # the ratio is the same in every row


def test_rows_without_text_or_label_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"text": " ", "label": "yes"}, {"text": "film", "label": None}, {"text": "film", "label": "maybe"}]
    assert usable_rows(TASKS["one-token"], bad + reviews(2)) == reviews(2)
    assert "3 of 5 rows are left out" in caplog.text
    with pytest.raises(ValueError, match="`rows` must hold rows with text and 'label', got none among 3"):
        usable_rows(TASKS["one-token"], bad)
    with pytest.raises(ValueError, match=r"prompt 'a' must have shape \[P, 32\] for this model, got \[2, 8\]"):
        score_prompts(tuned_on(), tiny_tokenizer(), TASKS["one-token"], reviews(2), {"a": torch.randn(2, 8)})
