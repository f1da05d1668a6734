"""Rows as text: templates, missing values, labels, conversations."""

# ruff: noqa: E501 (a line for each case)

from __future__ import annotations

import datetime
import json
import logging
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from softprompt_fast.cli.data import TaskOptions
from softprompt_fast.tasks.examples import complete_rows, has_target, is_empty, usable_rows
from softprompt_fast.tasks.tables import load_rows
from softprompt_fast.tasks.task import Task, classification_task, generation_task
from softprompt_fast.tasks.templates import field, parse, render, unescaped
from softprompt_fast.tasks.values import is_missing, label_name, label_names, matching_label, plain, text_of

MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), "", "  ", "\n\t", Decimal("nan")]
PRESENT = [0, False, "0", "None", "NA", "nan", "null", 0.0, [], "."]
COLUMNS = [
    "text",
    "review.text",
    "text[en]",
    "q:1",
    "text!",
    "a}b",
    "{",
    "}}",
    "a\\",
    "\\}",
    "0",
    "a b",
    "\n",
    "a\\n",
    "text!r",
]
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_values_are_one_thing(value: Any) -> None:
    task = Task("classification", "{text}\nLabel:", "label", {"a": " a", "None": " None", "nan": " nan"})
    assert is_missing(value) and text_of(value, "x").strip() == ""
    assert is_empty(task, {"text": value}) and not has_target(task, {"text": "x", "label": value})
    with pytest.raises(ValueError, match="the text is empty"):
        task.text({"text": value})
    with pytest.raises(ValueError, match="the row has no 'label'"):
        task.target({"text": "x", "label": value})
    with pytest.raises(ValueError, match="the row has no 'answer'"):
        Task("generation", "{text}", "answer").target({"answer": value})
    assert Task("generation", "{title}\n{text}\nLabel:", "answer").text({"title": "t", "text": value}).replace(
        str(value), ""
    ) in ("t\n\nLabel:",)


@pytest.mark.parametrize("value", PRESENT, ids=repr)
def test_other_values_are_not_missing(value: Any) -> None:
    assert not is_missing(value)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_is_called_what_it_is_called(column: str) -> None:
    assert parse(field(column)) == [("", column), ("", None)]
    for other in COLUMNS:
        template = f"{{{{ {field(column)}{field(other)} }}}}"
        assert render(template, {column: "1", other: "1"}) == "{ 11 }"
    task = classification_task([{column: "x", "label": "a"}, {column: "y", "label": "b"}], text_column=column)
    assert task.columns == [column] and task.text({column: "{x}"}) == "{x}\nLabel:"


def test_templates() -> None:
    assert render('{{"a": {text}}}', {"text": "1"}) == '{"a": 1}'
    assert render("{a}{b}{a}", {"a": "1", "b": "{a}"}) == "1{a}1"
    assert unescaped(r"a\nb\tc\\n\\\n") == "a\nb\tc\\n\\\n" and unescaped(r"\d{a\}}") == r"\d{a\}}"
    for template in ("{text", "text}", "{}", "{text} {", "{a{b}}"):
        with pytest.raises(ValueError, match="braces doubled"):
            Task("generation", template, "answer")
    task = Task("generation", '{text}\nReply {"a": 1}', "answer")
    with pytest.raises(ValueError, match=r"names column '\"a\": 1', but the data has .*doubled: \{\{ and \}\}"):
        task.text({"text": "x"})
    with pytest.raises(ValueError, match="must not name the column of the answer, got 'label'"):
        Task("classification", "{text} {label} Sentiment:", "label", {"a": " a", "b": " b"})
    task = TaskOptions(template=r"{text}\tC:\\dir\nLabel:").task([{"text": "x", "label": "a"}, {"label": "b"}])
    assert task.text({"text": "x"}) == "x\tC:\\dir\nLabel:"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (1.5, "1.5"),
        (True, "true"),
        (np.bool_(False), "false"),
        (np.float32(0.1), "0.1"),
        (np.int8(3), "3"),
        (Decimal("1.70"), "1.70"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (pd.Timestamp("2024-05-01", tz="UTC"), "2024-05-01T00:00:00+00:00"),
        (" x ", " x "),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert text_of(value, "x") == text


@pytest.mark.parametrize("value", [["a", "b"], [27], {"a": 1}, b"a", [], ("a",), np.array(["a", "b"])], ids=repr)
def test_values_that_are_no_text_are_refused(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(ValueError, match=f"column 'text' must hold text, got {kind}"):
        Task("generation", "{text}", "answer").text({"text": value})
    with pytest.raises(ValueError, match=f"column 'answer' must hold text, got {kind}"):
        Task("generation", "{text}", "answer").target({"answer": value})
    with pytest.raises(ValueError, match=f"row 1: column 'label' must hold one label in each row, got {kind}"):
        classification_task([{"text": "x", "label": "a"}, {"text": "x", "label": value}])


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ValueError, match="column 'text' must hold valid Unicode text"):
        Task("generation", "{text}", "answer").text({"text": "bad \ud83d end"})


def test_labels_are_matched_by_value() -> None:
    labels = ["0", "1", "true", "007", "x"]
    same = {"1": "1", "1.0": "1", "+1": "1", "0.0": "0", "True": "true", "TRUE": "true", "007": "007", "x": "x"}
    assert {name: matching_label(name, labels) for name in same} == same
    for other in ("7", "X", "2", "", "false", "1x"):
        assert matching_label(other, labels) is None
    for value, name in (
        (1, "1"),
        (1.0, "1"),
        (np.float64(2), "2"),
        (True, "true"),
        (0.5, "0.5"),
        (Decimal("3.0"), "3"),
    ):
        assert label_name(value, "label") == name
    assert label_names({"1", "1.0", "2.0", "1.1", "1.10", "01"}) == ["01", "1", "1.1", "1.10", "2.0"]
    task = classification_task([{"label": 1.0}, {"label": "0"}, {"label": None}, {"label": 1}])
    assert task.labels == ["0", "1"] and task.label({"label": 1}) == task.label({"label": "1.0"}) == "1"
    task = Task("classification", "{text}", "label", {"True": " yes", "False": " no"})
    assert task.target({"label": True}) == " yes" and task.target({"label": "false"}) == " no"
    with pytest.raises(ValueError, match="label '2' is not among the task's labels"):
        task.label({"label": 2.0})


@pytest.mark.parametrize("words", [["None", "Support"], ["NA", "DE"], ["true", "false"], ["nan", "null"]])
def test_words_of_a_csv_are_labels(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{word}\n" for word in words))
    rows = load_rows(str(tmp_path / "a.csv"))
    task = classification_task(rows)
    assert task.label_words == {word: f" {word}" for word in sorted(words)} and usable_rows(task, rows) == rows


def test_rows_that_lack_something_are_left_out_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,\n,0\nc,0\n  ,1\n")
    rows = load_rows(str(tmp_path / "a.csv"))
    task = classification_task(rows)
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        assert [row["text"] for row in complete_rows(task, rows)] == ["a", "c"]
    path = tmp_path / "a.csv"
    assert f"3 of 5 rows are left out: no 'label' ({path}, line 3); no text ({path}, lines 4, 6)" in caplog.text
    with pytest.raises(ValueError, match=r"got none among 1: no text \(.*line 4\)"):
        complete_rows(task, rows[2:3])
    with pytest.raises(ValueError, match=r"no column 'label' in the data, which has \['text'\]"):
        complete_rows(task, [{"text": "x"}])


def test_rows_that_cannot_be_read_cost_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    values = ['"a"', '"bad \\ud83d"', '["x"]', '{"y": 1}', '"b"', "null"]
    path.write_text("".join(f'{{"text": {value}, "label": {i % 2}}}\n' for i, value in enumerate(values)))
    rows = load_rows(str(path))
    task = classification_task(rows, prompt="p")
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        for kept in (complete_rows(task, rows), usable_rows(task, rows)):
            assert [row["text"] for row in kept] == ["a", "b"]
    assert (
        f"4 of 6 rows are left out: no readable text ({path}, lines 2, 3, 4: column 'text' must hold valid Unicode text, "
        f"got half a surrogate pair in 'bad \\ud83d'); no text ({path}, line 6)"
    ) in caplog.text
    answers = [{"prompt": "q", "response": response} for response in ("a", ["a"], "\ud83d", None)]
    assert complete_rows(generation_task(), answers) == answers[:1]
    labels = [{"text": "a", "label": label} for label in ("x", "y", "\ud83d")]
    assert classification_task(labels).labels == ["x", "y"]
    assert complete_rows(classification_task(labels), labels) == labels[:2]
    assert usable_rows(classification_task(labels), labels) == labels[:2]
    with pytest.raises(ValueError, match="must hold one label in each row, got list"):
        complete_rows(task, [{"text": "a", "label": [1]}])


def test_strict_json() -> None:
    row = {
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "when": pd.Timestamp("2024-05-01T10:00:00+02:00"),
        "d": Decimal("1.70"),
        "raw": b"\x00",
        "nat": pd.NaT,
        "n": np.int64(2),
        "array": np.array([1.5, float("nan")]),
    }
    assert json.loads(json.dumps(plain(row), allow_nan=False)) == {
        "nan": None,
        "inf": ["Infinity", "-Infinity"],
        "when": "2024-05-01T10:00:00+02:00",
        "d": "1.70",
        "raw": "AA==",
        "nat": None,
        "n": 2,
        "array": [1.5, None],
    }


TOKENIZER = SimpleNamespace(chat_template=CHAT, bos_token="<s>", eos_token="</s>")
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "options", "text"),
    [
        ({"messages": MESSAGES}, {}, "<s>[system] s\n[user] q\n[assistant] "),
        ({"conversations": SHARE}, {}, "<s>[user] q\n[assistant] "),
        ({"messages": PARTS}, {}, "<s>[user] q\n[assistant] "),
        ({"talk": MESSAGES, "prompt": "x"}, {"chat_column": "talk"}, "<s>[system] s\n[user] q\n[assistant] "),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, {}, "<s>[system] s\n[user] q\n[assistant] "),
        ({"prompt": MESSAGES[:2], "response": "a"}, {}, "<s>[system] s\n[user] q\n[assistant] "),
    ],
)
def test_conversations_are_read_through_the_chat_template(row: Any, options: Any, text: str, tmp_path: Path) -> None:
    task = TaskOptions(kind="generation", **options).task([row])
    with pytest.raises(ValueError, match=r"task.read_chat\(tokenizer\)"):
        task.text(row)
    task.read_chat(TOKENIZER)
    task.save(tmp_path)
    loaded = Task.load(tmp_path)
    assert loaded.text(row) == text and loaded.target(row) == "a" and not loaded.special_tokens


def test_conversations_that_cannot_be_read() -> None:
    task = TaskOptions(kind="generation").task([{"messages": MESSAGES}])
    with pytest.raises(ValueError, match="whose tokenizer has a chat template"):
        task.read_chat(SimpleNamespace(chat_template=None))
    task.read_chat(TOKENIZER)
    with pytest.raises(ValueError, match="must end with an answer of the assistant, got 'user'"):
        task.target({"messages": MESSAGES[:2]})
    with pytest.raises(ValueError, match=r"a turn before the answer"):
        task.text({"messages": MESSAGES[2:]})
    with pytest.raises(ValueError, match=r"got a conversation; .*--chat-column"):
        generation_task(input_column="messages", output_column="x").text({"messages": MESSAGES})
    with pytest.raises(ValueError, match="must name a column of conversations, got 'text'"):
        TaskOptions(kind="generation", chat_column="text").task([{"text": "x"}])
    with pytest.raises(ValueError, match="--chat-column cannot be used without --task generation"):
        TaskOptions(chat_column="text").task([{"text": "x"}])
    with pytest.raises(ValueError, match=r"must not name the column of the answer"):
        TaskOptions(kind="generation", input_column="text", output_column="text").task([{"text": "x"}])


def test_a_label_with_an_equals_sign_has_a_word() -> None:
    rows = [{"text": "x", "label": label} for label in ("a=b", "a", "c")]
    task = TaskOptions(label_word=["a=b=eq", "a=first", "c=d=e"]).task(rows)
    assert task.label_words == {"a=b": " eq", "a": " first", "c": " d=e"}
