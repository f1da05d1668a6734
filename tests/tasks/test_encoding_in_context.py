"""What a model reads: answers as in running text, one BOS, cut columns, labels that can all win."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.running_text import byte_bpe, prepending

from softprompt_fast.tasks.cuts import counting_cuts
from softprompt_fast.tasks.encoding import (
    IGNORED,
    check_label_words,
    encode,
    encode_target,
    encode_text,
    label_words,
    token_ids,
)
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tasks.words import alike, begins_another, spaced

FILLER = [f"w{chr(97 + i // 20)}{chr(97 + i % 20)}" for i in range(40)]


def two_labels(template: str, a: str = " negative", b: str = " positive", **fields: Any) -> Task:
    return Task("classification", template, "label", {"a": a, "b": b}, **fields)


def running(tokenizer: Any, task: Task, row: dict[str, str]) -> list[int]:
    """The ids that a model reads in training, text and answer."""
    (feature,) = encode(task, [row], tokenizer)
    return list(feature["input_ids"])


def test_words_have_no_token_of_their_own_space_where_a_tokenizer_prepends_one() -> None:
    tokenizer = prepending("negative", "positive", "x", "Label:")
    assert len(token_ids(tokenizer, " negative")) == 2  # alone: the prepended space is a token
    task = two_labels("{text}\nLabel:")
    words = [tokenizer.convert_ids_to_tokens(word) for word in label_words(task, tokenizer)]
    assert words == [["▁negative"], ["▁positive"]]
    row = {"text": "x", "label": "a"}
    assert running(tokenizer, task, row) == token_ids(tokenizer, "x\nLabel: negative")


def test_responses_have_the_tokens_of_running_text() -> None:
    tokenizer = prepending("negative", "positive", "x", "Label:")
    task = Task("generation", "{text}\nLabel:", "answer")
    row = {"text": "x", "answer": " negative positive"}
    assert running(tokenizer, task, row) == [*token_ids(tokenizer, "x\nLabel: negative positive"), 2]


@pytest.mark.parametrize("template", ["{text} Sentiment: ", "{text} Sentiment:  ", "{text} "])
@pytest.mark.parametrize("word", ["neg", " neg"])
def test_the_space_at_a_templates_end_is_the_one_before_the_word(template: str, word: str) -> None:
    tokenizer = byte_bpe(" neg", " pos", "neg", "pos", "x")
    task = two_labels(template, word, " pos")
    text = template.format(text="x").rstrip()
    row = {"text": "x", "label": "a"}
    assert encode_text(task, row, tokenizer) == token_ids(tokenizer, text)
    assert running(tokenizer, task, row) == token_ids(tokenizer, f"{text} neg")
    answer = Task("generation", template, "answer")
    assert running(tokenizer, answer, row | {"answer": "neg"}) == [*token_ids(tokenizer, f"{text} neg"), 2]


def test_words_of_scripts_without_spaces_get_none() -> None:
    tokenizer = byte_bpe("负面", "正面")
    task = classification_task([], template="评论:{text}\n情感:", label_words={"0": "负面", "1": "正面"})
    assert [len(word) for word in label_words(task, tokenizer)] == [1, 1]
    assert [spaced(word) for word in ("neg", " neg", "负面", "ดี", "よい", "좋다", "Ж", "7")] == [
        " neg",
        " neg",
        "负面",
        "ดี",
        "よい",
        " 좋다",
        " Ж",
        " 7",
    ]
    assert spaced("neg", "{text} Sentiment: ") == "neg" == spaced("neg", "{text}\n")
    rows = [{"text": "x", "label": label} for label in ("好", "坏")]
    assert classification_task(rows).label_words == {"坏": "坏", "好": "好"}


def test_a_word_that_joins_the_text_before_it_keeps_tokens_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_bpe("good", "goodyes")
    task = two_labels("{text}", "yes", "no")
    assert label_words(task, tokenizer) == [token_ids(tokenizer, "yes"), token_ids(tokenizer, "no")]
    rows = [{"text": "good", "label": "a"}, {"text": "so", "label": "b"}]
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        check_label_words(task, rows, tokenizer)
    assert "depend on the end of the text in 1 of 2 rows" in caplog.text


@pytest.mark.parametrize("special_tokens", [True, False])
def test_a_text_has_one_bos(special_tokens: bool) -> None:
    tokenizer = byte_bpe("x", bos=True)
    row = {"text": "x"}
    expected = [1, *token_ids(tokenizer, "x")] if special_tokens else token_ids(tokenizer, "x")
    for template in ("{text}", "<s>{text}"):
        assert encode_text(two_labels(template, special_tokens=special_tokens), row, tokenizer) == expected
    old = two_labels("<s>{text}", special_tokens=special_tokens, encoding=1)
    assert encode_text(old, row, tokenizer).count(1) == 1 + special_tokens  # as such prompts were tuned


@pytest.mark.parametrize("make", [byte_bpe, prepending])
def test_cutting_keeps_bos_and_the_templates_words(make: Any) -> None:
    words = ["Is", "this", "good?", "Answer:", *FILLER]
    tokenizer = make(*words, *(f" {word}" for word in words), bos=True)
    task = two_labels("Is this good? {text}\nAnswer:", max_length=16)
    row = {"text": " ".join(FILLER)}
    ids = encode_text(task, row, tokenizer)
    fixed = list(tokenizer(task.template.replace("{text}", "")).input_ids)
    kept = tokenizer.decode(ids, skip_special_tokens=True).replace("▁", " ").split()
    assert ids[0] == 1 and len(ids) == 16
    assert kept[:3] == ["Is", "this", "good?"] and kept[-1] == "Answer:"
    assert kept[3:-1] == FILLER[-len(kept[3:-1]) :] and len(kept) > 5
    with pytest.raises(ValueError, match=r"`max_length` must leave room for the template's own \d+ tokens, got 4"):
        encode_text(two_labels(task.template, max_length=4), row, tokenizer)
    assert len(fixed) < 16


def test_the_longest_column_is_cut_first() -> None:
    tokenizer = byte_bpe(*FILLER, *(f" {word}" for word in FILLER), "A:", " B:", " C:")
    task = two_labels("A: {a} B: {b}{c} C:", max_length=14)
    ids = encode_text(task, {"a": "wab wac", "b": " ".join(FILLER), "c": ""}, tokenizer)
    assert tokenizer.decode(ids).startswith("A: wab wac B:") and tokenizer.decode(ids).endswith(f"{FILLER[-1]} C:")
    assert len(ids) == 14


def test_every_cut_is_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_bpe("x", " x", ":")
    task = Task("generation", "{text}:", "answer", max_length=6)
    rows = [{"text": "x" + " x" * n, "answer": " x" * m} for n, m in ((1, 1), (20, 1), (1, 9), (4, 5))]
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        features = encode(task, rows, tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "longer than max_length=6 tokens: 1 of 4 texts lose their beginning (the template's words stay), "
        "1 of 4 responses lose their end and their end token"
    ]
    assert [feature["input_ids"][-1] == 2 for feature in features] == [True, True, False, True]
    with counting_cuts(log=False) as cuts:
        encode(task, rows, tokenizer)
    assert (cuts.cut_texts, cuts.cut_responses) == (1, 1) and len(caplog.records) == 1


# --- every label can win ---


@pytest.mark.parametrize("labels", [[str(i) for i in range(13)], ["ham", "spam", "spam link"]])
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_words_that_begin_others_end_with_the_end_token(labels: list[str], encoder_decoder: bool) -> None:
    tokenizer = byte_bpe(" ham", " spam", " link", *"0123456789")
    task = Task("classification", "{text}\nLabel:", "label", {label: f" {label}" for label in labels})
    words = label_words(task, tokenizer, encoder_decoder=encoder_decoder)
    assert all(word[-1] == 2 for word in words) and not begins_another(words)
    row = {"text": "x", "label": labels[-1]}
    assert encode_target(task, row, tokenizer, encoder_decoder=encoder_decoder) == words[-1]
    old = Task(**vars(task) | {"encoding": 1})
    assert label_words(old, tokenizer) == [word[:-1] for word in words]


def test_words_that_begin_no_other_have_no_end() -> None:
    tokenizer = byte_bpe(" negative", " positive")
    task = two_labels("{text}\nLabel:")
    ids = [token_ids(tokenizer, word) for word in (" negative", " positive")]
    assert label_words(task, tokenizer) == ids and [len(word) for word in ids] == [1, 1]
    (feature,) = encode(task, [{"text": "x", "label": "a"}], tokenizer)
    assert feature["labels"][-2:] == [IGNORED, ids[0][0]]


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    tokenizer = byte_bpe(" pos")
    rows = [{"text": "x", "label": label} for label in ("neg", "pos", "pos ")]
    with pytest.raises(ValueError, match="different tokens, got the same for 'pos', 'pos '"):
        check_label_words(classification_task(rows), rows, tokenizer)
    blank = two_labels("{text}:", "  ", " pos")
    with pytest.raises(ValueError, match="must have tokens, got '  ' for 'a'"):
        check_label_words(blank, [], tokenizer)
    assert alike(["pos", "Pos", "POS", "neg", "pos ", "été", "e\u0301te\u0301"]) == [
        ["pos", "Pos", "POS", "pos "],
        ["été", "e\u0301te\u0301"],
    ]
