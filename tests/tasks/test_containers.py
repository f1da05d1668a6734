"""Rows in the containers that people have them in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.tasks.containers import as_rows, listed
from softprompt_fast.tasks.examples import complete_rows, split_rows
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.job import TuningJob


class Polars:
    """What a frame of polars has: ``to_dict`` takes no arguments by position."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.columns = list(rows[0])

    def __iter__(self) -> Any:
        return iter(self.columns)

    def to_dict(self, *, as_series: bool = True) -> Any:
        raise AssertionError

    def to_dicts(self) -> list[dict[str, Any]]:
        return self.rows


def test_every_container_gives_the_same_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = reviews(6)
    frame = pd.DataFrame(rows)[::-1]
    stored = datasets.Dataset.from_list(rows)
    for data in (rows, tuple(rows), iter(rows), frame[::-1], Polars(rows), pa.Table.from_pylist(rows), stored):
        assert as_rows(data) == rows
    assert as_rows(frame) == rows[::-1] and listed(frame["text"], "texts", "texts")[0] == rows[-1]["text"]
    names = datasets.ClassLabel(names=["no", "yes"])
    numbered = stored.cast_column("label", names)
    assert as_rows(numbered) == rows and as_rows(numbered.select([5, 1])) == [rows[5], rows[1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("film", "`rows` must be a list of rows, got one str"),
        ({"text": ["a"]}, "`rows` must be a list of rows, got one dict"),
        ({"a", "b"}, "`rows` must be a list of rows, got one set"),
        (None, "`rows` must be a list of rows, got one NoneType"),
        (["a"], "a mapping of columns in each row, got str in row 0"),
        (np.array([["a", "b"]]), "a mapping of columns in each row, got ndarray in row 0"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "must name each column once, got text more than once"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "must name each column once, got text more than once"),
    ],
)
def test_what_holds_no_rows_is_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_rows(data)


def test_a_table_is_tuned_on_scored_and_answered() -> None:
    rows = reviews(8)
    frame = pd.DataFrame(rows).sample(frac=1, random_state=1)
    order = list(frame.index)
    task = classification_task(frame, prompt="p")
    assert task == classification_task(rows, prompt="p")
    model, tokenizer = SoftPromptModel(build("llama")), tiny_tokenizer()
    model.add_prompt("p", 3)
    assert evaluate(model, tokenizer, task, frame) == pytest.approx(evaluate(model, tokenizer, task, rows))
    expected = predict(model, tokenizer, task, rows)
    for one, place in zip(predict(model, tokenizer, task, frame), order, strict=True):
        assert one["scores"] == pytest.approx(expected[place]["scores"])
    assert TuningJob(task, frame, frame).train_rows == [rows[i] for i in order]
    assert split_rows(frame[:0:-1], 2)[1] == split_rows([rows[i] for i in order[:0:-1]], 2)[1]
    assert len(complete_rows(task, frame.assign(label=[None, *frame["label"][1:]]))) == 7


def test_rows_without_text_or_target_are_refused_with_what_to_do() -> None:
    model, tokenizer = SoftPromptModel(build("llama")), tiny_tokenizer()
    model.add_prompt("p", 3)
    task = Task("classification", "{text}", "label", {"yes": " yes", "no": " no"}, prompt="p")
    rows = [*reviews(3), {"text": "film", "label": None}, {"text": "bad \ud83d", "label": "yes"}]
    message = r"2 of 5 lack one: row 3 has no 'label'; tasks.complete_rows\(task, rows\) leaves such rows out"
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, task, rows)
    assert evaluate(model, tokenizer, task, complete_rows(task, rows))["rows"] == 3
