"""The log of answers holds what a second pass of the model would observe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.evaluation.observations import Observation, observe
from softprompt_fast.evaluation.profile import record_profile
from softprompt_fast.inference import PromptBank, SoftPromptPipeline
from softprompt_fast.inference.answer_log import AnswerLog
from softprompt_fast.inference.files import answer_rows
from softprompt_fast.tasks.task import classification_task, generation_task

ROWS = [*reviews(8), {"text": "film"}, {"text": None, "label": "yes"}]


@pytest.fixture(params=["plain", "deep"])
def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A model with two prompts, saved in a folder with their tasks."""
    model = (spf.SoftPromptModel if request.param == "plain" else spf.DeepPromptModel)(build("llama"))
    for name in ("p", "q"):
        model.add_prompt(name, num_virtual_tokens=3, init="random")
    model.save_pretrained(tmp_path)
    classification_task(reviews(), prompt="p").save(tmp_path / "p")
    generation_task(input_column="text", output_column="label", prompt="q").save(tmp_path / "q")
    return model


def lines(tuned: Any, folder: Path, names: list[str | None], **options: Any) -> list[dict[str, Any]]:
    bank = PromptBank(build("llama"))
    bank.add_directory(folder)
    pipe = SoftPromptPipeline(bank, tiny_tokenizer())
    path = folder / "logs" / "answers.log"
    log = AnswerLog(path, pipe, {name: folder / name for name in ("p", "q")}, **options)
    for part in (slice(0, 4), slice(4, 10)):
        results = answer_rows(pipe, ROWS[part], names[part], {"max_new_tokens": 2})
        log.write(ROWS[part], names[part], results)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_equals_a_second_pass(tuned: Any, tmp_path: Path) -> None:
    task = classification_task(reviews(), prompt="p")
    profile = record_profile(tuned, tiny_tokenizer(), task, reviews(20), tmp_path / "p")
    profile.save(tmp_path / "p")
    found = lines(tuned, tmp_path, ["p"] * 10)
    known = profile.known_tokens
    seen = observe(tuned, tiny_tokenizer(), task, ROWS[:9], prompt="p", known=known, bare=False)
    for line, one in zip(found, seen, strict=False):
        logged = Observation.from_json(line)
        assert replace(logged, margin=None, entropy=None) == replace(one, margin=None, entropy=None)
        assert logged.margin == pytest.approx(one.margin, abs=1e-4)
        assert logged.entropy == pytest.approx(one.entropy, abs=1e-4)
    assert {line["digest"] for line in found} == {profile.digest}
    assert {line["reference"] for line in found} == {profile.tokens_digest}
    assert found[8].get("correct") is None and found[8]["text"].startswith("film")
    assert "the text is empty" in found[9]["error"] and "row" not in found[9]


def test_a_label_that_is_none_ends_nothing(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROWS", [row | {"label": ["yes", "no"]} for row in ROWS])
    found = lines(tuned, tmp_path, ["p"] * 10)
    assert len(found) == 10 and all("correct" not in line for line in found)


def test_a_log_without_texts_holds_none(tuned: Any, tmp_path: Path) -> None:
    names: list[str | None] = ["p", "q", None, *["p"] * 7]
    found = lines(tuned, tmp_path, names, texts=False)
    assert [line["prompt"] for line in found] == ["p", "q", *["p"] * 7]
    text = (tmp_path / "logs" / "answers.log").read_text()
    assert not any(word in text for word in ("film", "lovely", "awful", "is empty"))
    assert "new_tokens" not in found[0]  # there is no profile
    assert "answer" not in found[1] and found[1]["tokens"] > 0


def test_a_log_is_continued(tuned: Any, tmp_path: Path) -> None:
    assert len(lines(tuned, tmp_path, ["p"] * 10)) == 10
    assert len(lines(tuned, tmp_path, ["p"] * 10)) == 20


def test_prompts_without_a_task_cannot_be_logged(tmp_path: Path) -> None:
    pipe = SoftPromptPipeline(PromptBank(build("llama")), tiny_tokenizer())
    pipe.bank.add("p", torch.randn(3, 32))
    with pytest.raises(ValueError, match=r"a log must be of prompts with a task\.json, got p"):
        AnswerLog(tmp_path / "a.log", pipe, {"p": tmp_path})
