"""One bad row costs one row, whatever container the rows are in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.running_text import byte_bpe
from support.serving import LABELS, NAMES, TEXTS, pipeline
from support.tiny_models import build

from softprompt_fast.evaluation.predictions import predict
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.inference.requests import Request, Unit, answer
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.tasks.task import Task

BAD: list[tuple[Any, str]] = [
    (None, "the text is empty"),
    (float("nan"), "the text is empty"),
    (pd.NA, "the text is empty"),
    (pd.NaT, "the text is empty"),
    (" \n", "the text is empty"),
    (3, "a text must be a string or a mapping of columns, got int"),
    (b"fine", "a text must be a string or a mapping of columns, got bytes"),
    (["fine"], "a text must be a string or a mapping of columns, got list"),
    ("dull \ud83d", "the text must be valid Unicode, got half of a surrogate pair ('\\ud83d') at character 5"),
]
TASK = Task("classification", "{text} Label :", "label", {"a": " yes", "b": " no"})
CALLS: dict[str, Callable[[SoftPromptPipeline, list[Any], str | None], list[dict[str, Any]]]] = {
    "classify": lambda pipe, texts, name: pipe.classify(texts, name, labels=LABELS),
    "score": lambda pipe, texts, name: pipe.score(texts, [" yes"] * len(texts), name),
    "generate": lambda pipe, texts, name: pipe.generate(texts, name, max_new_tokens=2, do_sample=False),
    "embed": lambda pipe, texts, name: pipe.embed(texts, name),
}


def tasked() -> SoftPromptPipeline:
    pipe = pipeline()
    pipe.bank.add("tasked", pipe.bank["middle"], task=TASK)
    return pipe


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["short", "tasked", None])
def test_a_bad_row_gets_an_error_and_the_others_their_answers(call: str, name: str | None) -> None:
    pipe = tasked()
    texts = ["fine film", *(text for text, _ in BAD), "no plot"]
    found = CALLS[call](pipe, texts, name)
    errors = [error for _, error in BAD]
    if name == "tasked":  # its template names the column
        errors[-1] = "column 'text' must hold valid Unicode text, got half a surrogate pair in 'dull \\ud83d'"
    assert [result.get("error") for result in found] == [None, *errors, None]
    alone = CALLS[call](pipe, ["no plot"], name)[0]
    for key, value in alone.items():
        if key in ("prediction", "text"):
            assert found[-1][key] == value
        elif isinstance(value, dict):
            assert list(found[-1][key].values()) == pytest.approx(list(value.values()), rel=1e-4)
        else:
            assert np.allclose(found[-1][key], value, atol=1e-5)


def test_bad_columns_prompts_and_continuations_cost_their_rows() -> None:
    pipe = tasked()
    two = Task("classification", "{text} : {more}", "label", {"a": " yes", "b": " no"})
    pipe.bank.add("two", pipe.bank["short"], task=two)
    rows = [{"text": None, "more": float("nan")}, {"text": "fine", "more": "film"}, "fine film"]
    errors = [result.get("error") for result in pipe.classify(rows, "two")]
    assert errors == ["the text is empty", None, "a text must be a mapping with the columns text, more, got a string"]
    names = ["short", ["short"], 3, "none", float("nan")]
    found = pipe.classify(["fine"] * 5, names, labels=LABELS)
    assert [("error" in result) for result in found] == [False, True, True, True, False]
    scores = pipe.score(["fine"] * 3, [" yes", None, " \ud83d"], "short")
    assert [("error" in result) for result in scores] == [False, True, True]
    with pytest.raises(TypeError, match="`texts` must be a list of texts, got one str"):
        pipe.embed("fine film")
    with pytest.raises(TypeError, match="`labels` must be a list or a mapping of words, got one str"):
        pipe.classify(["fine"], labels="yes")


def test_containers_are_read_by_position() -> None:
    datasets = pytest.importorskip("datasets")
    pipe = pipeline()
    frame = pd.DataFrame({"text": TEXTS, "task": NAMES}).sample(frac=1, random_state=1)[1:]
    order = [TEXTS.index(text) for text in frame["text"]]
    texts, names = [TEXTS[i] for i in order], [NAMES[i] for i in order]
    words = [" very", " plot", " film", " no", " dull"]
    expected = pipe.score(texts, words, names)
    stored = datasets.Dataset.from_dict({"text": texts, "task": names})
    for given, given_names in (
        (frame["text"], frame["task"]),
        (np.array(texts), np.array(names, dtype=object)),
        ((text for text in texts), (name for name in names)),
        (stored["text"], stored["task"]),
        (tuple(texts), tuple(names)),
    ):
        assert pipe.score(given, pd.Series(words, index=[9, 1, 8, 2, 7]), given_names) == expected


def test_the_rows_of_a_table_are_its_columns() -> None:
    pipe = tasked()
    frame = pd.DataFrame({"text": TEXTS, "other": range(6)})[::-1]
    assert pipe.classify(frame, "tasked") == pipe.classify(TEXTS[::-1], "tasked")


def test_a_result_that_cannot_be_made_costs_its_row() -> None:
    def prepare(index: int) -> Request:
        return Request([Unit(index, 0, None, [1])], lambda results: {"value": 1 // results[0]})

    found = answer(3, prepare, lambda units: [unit.row for unit in units], max_rows=4, max_tokens=9)
    assert [result.get("value") for result in found] == [None, 1, 0]
    assert found[0] == {"error": "integer division or modulo by zero"}


def test_the_pipeline_counts_cut_texts_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    pipe.bank.add("cut", pipe.bank["short"], task=Task(**vars(TASK) | {"max_length": 4}))
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        pipe.classify(["fine film", "film plot film", "dull"], "cut")
    lines = [record.getMessage() for record in caplog.records if "longer" in record.getMessage()]
    assert lines == ["longer than max_length=4 tokens: 1 of 3 texts lose their beginning (the template's words stay)"]


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_pipeline_and_evaluation_score_the_same_ends(arch: str) -> None:
    tokenizer = byte_bpe(" ham", " spam", " link")
    base = build(arch)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    words = {label: f" {label}" for label in ("ham", "spam", "spam link")}
    task = Task("classification", "{text}\nLabel: ", "label", words, prompt="p")
    model = SoftPromptModel(base)
    model.add_prompt("p", 4)
    bank = PromptBank(base)
    bank.add("p", model.prompts["p"], task=task)
    rows = [{"text": text} for text in ("x", "spam spam", "ham or ham")]
    answers = SoftPromptPipeline(bank, tokenizer).classify(rows, "p")
    for mine, other in zip(answers, predict(model, tokenizer, task, rows), strict=True):
        assert list(mine["scores"].values()) == pytest.approx(list(other["scores"].values()), abs=1e-5)
    given = SoftPromptPipeline(bank, tokenizer).classify(rows, "p", labels=words)
    assert [result["scores"] for result in given] == [result["scores"] for result in answers]


def test_a_generated_answer_does_not_begin_with_the_templates_space() -> None:
    tokenizer = byte_bpe(" neg", " pos", "x")
    base = build("llama")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    found = {}
    for template in ("{text}:", "{text}: "):
        bank = PromptBank(base)
        bank.add("p", torch.zeros(2, bank.model.prompts.embedding_dim), task=Task("generation", template, "answer"))
        (result,) = SoftPromptPipeline(bank, tokenizer).generate(["x"], "p", max_new_tokens=3, do_sample=False)
        found[template] = result["text"]
    assert found["{text}: "] == found["{text}:"].removeprefix(" ")
