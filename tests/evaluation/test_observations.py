"""Observations against predictions and hand computation; profiles on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support.analysis_cases import TASKS, tuned_on
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.evaluation import profile
from softprompt_fast.evaluation.observations import PROJECTIONS, InputReader, Observation, observe
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.evaluation.profile import PROFILE_FILE, Profile, prompt_digest, record_profile
from softprompt_fast.tasks.task import Task, classification_task

TOKENIZER = tiny_tokenizer()
ROWS = reviews(12)


def model_with_prompt(kind: str) -> spf.SoftPromptModel:
    if kind != "deep":
        return tuned_on(kind, p=torch.randn(3, 32))
    tuned = spf.DeepPromptModel(build("llama"))
    tuned.add_prompt("p", num_virtual_tokens=3, init="random")
    return tuned


@pytest.mark.parametrize("name", ["one-token", "several-tokens"])
@pytest.mark.parametrize("kind", ["llama", "t5", "gptj", "deep"])
def test_observations_of_a_classification_are_those_of_its_predictions(kind: str, name: str) -> None:
    tuned, task = model_with_prompt(kind), TASKS[name]
    seen = observe(tuned, TOKENIZER, task, ROWS, batch_size=5)
    expected = predict(tuned, TOKENIZER, task, ROWS)
    bare = predict(spf.SoftPromptModel(tuned.base_model), TOKENIZER, task, ROWS)
    for one, answer, other, row in zip(seen, expected, bare, ROWS, strict=True):
        scores = sorted(answer["scores"].values())
        assert one.answer == answer["prediction"] and one.correct == (one.answer == row["label"])
        assert one.margin == pytest.approx(scores[1] - scores[0], abs=2e-5)
        assert one.entropy == pytest.approx(-sum(p * math.log(p) for p in scores if p), abs=2e-5)
        assert one.bare_agrees == (one.answer == other["prediction"]) and one.loss is None
        assert one.tokens == len(TOKENIZER(task.text(row)).input_ids)
    assert sum(bool(one.correct) for one in seen) / 12 == evaluate(tuned, TOKENIZER, task, ROWS)["accuracy"]


@pytest.mark.parametrize("kind", ["llama", "t5", "deep"])
def test_observations_of_a_generation_task(kind: str) -> None:
    tuned, task = model_with_prompt(kind), TASKS["generation"]
    seen = observe(tuned, TOKENIZER, task, ROWS, batch_size=5)
    assert all(one.answer is None and one.correct is None and one.bare_agrees is not None for one in seen)
    assert all(0 <= (one.margin or 0) <= 1 and 0 < (one.entropy or 0) < math.log(96) for one in seen)
    weights = [2] * 12  # a word and the end token
    mean = sum((one.loss or 0) * weight for one, weight in zip(seen, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(evaluate(tuned, TOKENIZER, task, ROWS)["loss"], abs=1e-4)


def test_labels_and_the_bare_model_are_optional() -> None:
    tuned, counted = model_with_prompt("llama"), []
    rows = [{"text": row["text"]} for row in ROWS]
    seen = observe(tuned, TOKENIZER, TASKS["one-token"], rows, bare=False, progress=counted.append)
    assert {(one.correct, one.bare_agrees, one.new_tokens) for one in seen} == {(None, None, None)}
    assert sum(counted) == 12
    generated = observe(tuned, TOKENIZER, TASKS["generation"], rows, bare=False)
    assert {one.loss for one in generated} == {None}


def test_the_bare_model_reads_the_special_tokens_that_a_prompt_replaces() -> None:
    tuned = model_with_prompt("llama")
    rows = [{"text": f"{row['text']}"} for row in ROWS]
    own = Task("classification", "{text}", "label", {"yes": " fine", "no": " dull"}, prompt="p", special_tokens=False)
    usual = Task("classification", "{text}", "label", {"yes": " fine", "no": " dull"}, prompt="p")
    expected = predict(spf.SoftPromptModel(tuned.base_model), TOKENIZER, usual, rows)
    for one, answer in zip(observe(tuned, TOKENIZER, own, rows), expected, strict=True):
        assert one.bare_agrees == (one.answer == answer["prediction"])


def test_the_projection_is_the_same_for_ever() -> None:
    embedding = torch.nn.Embedding(3, 24)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(72).reshape(3, 24) / 72)
    reader = InputReader(embedding, TOKENIZER, None)
    one, two, both = (reader.read("", ids).embedding for ids in ([1], [2], [1, 2, 2, 1]))
    assert len(one) == PROJECTIONS
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(one, two, strict=True)], abs=1e-4)
    assert one[:3] == pytest.approx(FIRST, abs=1e-4)


FIRST = (0.232475, 0.799486, 0.226805)
"""A profile is compared with logs that other versions have written, so these never change."""


def test_tables_of_pandas_are_rows(tmp_path: Path) -> None:
    tuned, task, folder = saved(tmp_path)
    table = pd.DataFrame(ROWS)
    assert observe(tuned, TOKENIZER, task, table) == observe(tuned, TOKENIZER, task, ROWS)
    one, other = (record_profile(tuned, TOKENIZER, task, rows, folder) for rows in (table, ROWS))
    assert one.observations == other.observations


def test_an_observation_survives_json() -> None:
    (one,) = observe(model_with_prompt("llama"), TOKENIZER, TASKS["one-token"], ROWS[:1])
    assert Observation.from_json(json.loads(json.dumps(one.to_json() | {"text": "other keys"}))) == one


@pytest.mark.parametrize(
    "change",
    [
        {"row": None},
        {"tokens": "5"},
        {"embedding": [1.0]},
        {"embedding": 5},
        {"margin": "x"},
        {"entropy": float("nan")},
        {"correct": "yes"},
    ],
)
def test_a_damaged_observation_is_refused(change: dict[str, Any]) -> None:
    (one,) = observe(model_with_prompt("llama"), TOKENIZER, TASKS["one-token"], ROWS[:1])
    with pytest.raises(ValueError, match="an observation must hold"):
        Observation.from_json(one.to_json() | change)


def saved(folder: Path, **fields: Any) -> tuple[spf.SoftPromptModel, Task, Path]:
    tuned = model_with_prompt("llama")
    tuned.save_pretrained(folder)
    task = classification_task(reviews(), prompt="p", **fields)
    task.save(folder / "p")
    return tuned, task, folder / "p"


def test_a_profile_on_disk(tmp_path: Path) -> None:
    tuned, task, folder = saved(tmp_path)
    rows = [*reviews(40), {"text": None, "label": "yes"}]
    recorded = record_profile(tuned, TOKENIZER, task, rows, folder)
    path = recorded.save(folder)
    assert path == folder / PROFILE_FILE and Profile.load(folder) == recorded == Profile.load(path)
    assert len(recorded.observations) == 40 and recorded.digest == prompt_digest(folder, Task.load(folder))
    text = path.read_text()
    assert not any(word in text for word in ("film", "lovely", "awful"))
    assert recorded.save(tmp_path).read_bytes() == path.read_bytes()


def test_new_tokens_are_those_that_no_other_text_has(tmp_path: Path) -> None:
    tuned, task, folder = saved(tmp_path)
    texts = ["film great", "film great", "film plot", "plot dull", "plot <unk>"]
    rows = [{"text": text, "label": "yes"} for text in texts]
    recorded = record_profile(tuned, TOKENIZER, task, rows, folder)
    # Every text ends with "Label" and ":". "great" is in one text, which occurs twice.
    assert [one.new_tokens for one in recorded.observations] == [0.25, 0.25, 0.0, 0.25, 0.25]
    known = {TOKENIZER.convert_ids_to_tokens(token) for token in recorded.known_tokens}
    assert known == {"film", "great", "plot", "dull", "Label", ":"}
    new = observe(tuned, TOKENIZER, task, [{"text": "film poor unheard"}], known=recorded.known_tokens)
    assert new[0].new_tokens == 0.4


def test_many_rows_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "PROFILE_ROWS", 10)
    tuned, task, folder = saved(tmp_path)
    first, second = (record_profile(tuned, TOKENIZER, task, reviews(40), folder) for _ in range(2))
    assert first == second and len(first.observations) == 10


def test_the_digest_is_of_numbers_and_rules(tmp_path: Path) -> None:
    tuned, task, folder = saved(tmp_path / "a")
    other = tuned_on("llama", q=tuned.prompts.snapshot("p"))
    other.save_pretrained(tmp_path / "b")
    renamed = classification_task(reviews(), prompt="q", model="elsewhere")
    assert prompt_digest(tmp_path / "b" / "q", renamed) == prompt_digest(folder, task)
    assert prompt_digest(folder, classification_task(reviews(), template="{text} :")) != prompt_digest(folder, task)
    with torch.no_grad():
        other.prompts["q"].add_(1e-3)
    other.save_pretrained(tmp_path / "c")
    assert prompt_digest(tmp_path / "c" / "q", task) != prompt_digest(folder, task)


def test_profiles_that_cannot_be_read(tmp_path: Path) -> None:
    tuned, task, folder = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no profile\.json.*--reference"):
        Profile.load(folder)
    path = record_profile(tuned, TOKENIZER, task, ROWS, folder).save(folder)
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="the version of a profile must be 1, got 7; record it again"):
        Profile.load(folder)
    for damaged in (text[:200], "[]", text.replace('"tokens": "', '"tokens": "!'), text.replace('"rows.row"', '"r"')):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"not a profile|is damaged"):
            Profile.load(folder)
    with pytest.raises(ValueError, match="`rows` must hold rows with text, got none among 1"):
        record_profile(tuned, TOKENIZER, task, [{"text": ""}], folder)
