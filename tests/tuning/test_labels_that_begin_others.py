"""Tuning on labels of which one begins another, and on one-token labels, whose numbers stay as they were."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

from softprompt_fast.evaluation.predictions import predict
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.run import tune

TELLING = {"no": "dull", "yes": "great", "yes very": "lovely", "yes no": "poor"}


def rows(labels: list[str]) -> list[dict[str, Any]]:
    return [{"text": f"film {'plot ' * (i % 2)}{TELLING[label]}", "label": label} for i in range(4) for label in labels]


def tuned_on(task: Task, data: list[dict[str, Any]], output: Path, **options: Any) -> tuple[SoftPromptModel, Any]:
    model = SoftPromptModel(build("llama"))
    result = tune(
        model,
        tiny_tokenizer(),
        task,
        data,
        data,
        output,
        num_virtual_tokens=8,
        batch_size=8,
        init="vocabulary",
        **options,
    )
    return model, result


def test_every_label_is_predicted_on_its_training_rows(tmp_path: Path) -> None:
    data = rows(list(TELLING))
    task = classification_task(data, prompt="p")
    model, result = tuned_on(task, data, tmp_path, steps=60, eval_every=60, learning_rate=0.3)
    found = predict(model, tiny_tokenizer(), task, data)
    hits = Counter(row["label"] for row, one in zip(data, found, strict=True) if one["prediction"] == row["label"])
    assert set(hits) == set(TELLING), hits
    assert Task.load(result.folder).encoding == 2
    alone = predict(model, tiny_tokenizer(), Task(**vars(task) | {"encoding": 1}), data)
    assert {one["prediction"] for one in alone}.isdisjoint({"yes very", "yes no"})  # without an end they cannot win


def test_one_token_words_are_tuned_to_the_same_bits_as_before(tmp_path: Path) -> None:
    data = rows(["no", "yes"])
    runs = []
    for encoding in (1, 2):
        task = classification_task(data, prompt="p", encoding=encoding)
        model, result = tuned_on(task, data, tmp_path / str(encoding), steps=3, eval_every=1)
        losses = [point["loss"] for point in result.history]
        runs.append((model.prompts["p"].detach().clone(), losses, predict(model, tiny_tokenizer(), task, data)))
    (before, losses, answers), (after, new_losses, new_answers) = runs
    assert torch.equal(before, after) and losses == new_losses and answers == new_answers


def test_labels_to_look_at_are_named_before_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rows(["no", "yes"])
    task = classification_task([*data, {"text": "film", "label": "Yes"}], prompt="p")
    with caplog.at_level(logging.WARNING, "softprompt_fast"), pytest.raises(ValueError, match="got the same"):
        tuned_on(Task(**vars(task) | {"label_words": {"no": "no", "yes": "yes", "Yes": "yes"}}), data, tmp_path / "a")
    held_out = [*data, {"text": "film", "label": "Yes"}]
    words = {"no": "no", "yes": "yes", "Yes": "very"}
    model = SoftPromptModel(build("llama"))
    named = Task(**vars(task) | {"label_words": words})
    tune(model, tiny_tokenizer(), named, data, held_out, tmp_path / "b", steps=1, num_virtual_tokens=2)
    assert "labels 'yes', 'Yes' differ only in case, white space or Unicode form" in caplog.text
    assert "no training row has the labels 'Yes' of held-out rows" in caplog.text
