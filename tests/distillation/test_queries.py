"""Queries: given ones without answers, and those that the model makes itself."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.running_text import byte_bpe
from support.tiny_models import VOCABULARY, build
from support.tiny_reviews import WORDS, tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, chat_tokenizer, compressed, queries

from softprompt_fast.analysis.duplicates import normalise
from softprompt_fast.distillation import queries as module
from softprompt_fast.distillation.preparation import Prepared, prepare
from softprompt_fast.distillation.queries import DRAWS, SEEDS, query_starts, read_text_lines, usable_queries
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.source_text import SourceText
from softprompt_fast.distillation.teacher import Teacher
from softprompt_fast.tasks.task import generation_task

TASK = generation_task(template=TEMPLATE)
EVERY_WORD = [f"word{i}" for i in range(len(WORDS), VOCABULARY)]


def prepared(tokenizer: Any, output: Path, **options: Any) -> Prepared:
    given: dict[str, Any] = {
        "queries": [],
        "tokens": 4,
        "self_queries": 12,
        "text_column": "text",
        "template": None,
        "chat": False,
        "held_out": 0.25,
        "name": "prompt",
        "base_name": None,
        "max_drop": 0.0,
        "cache": output / "cache",
        "settings": DistillationSettings(new_tokens=4),
        "console": Console(quiet=True),
    }
    text = options.pop("text", TEXT)
    return prepare(build("llama"), tokenizer, text, Path(tempfile.mkdtemp(dir=output)), **given | options)


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, answers: list[str]) -> list[list[list[int]]]:
    """Lets the model say these texts in turn; returns what it read."""
    read: list[list[list[int]]] = []

    def generate(
        self: Teacher, asked: list[list[int]], seed: int | None = None, speaker: Any = None, **options: Any
    ) -> list[list[int]]:
        read.append(asked)
        start = sum(map(len, read[:-1]))
        return [tokenizer(answers[(start + i) % len(answers)]).input_ids for i in range(len(asked))]

    monkeypatch.setattr(Teacher, "generate", generate)
    without = {kind: (asked, ("",)) for kind, (asked, _) in SEEDS.items()}
    monkeypatch.setattr(module, "SEEDS", without)
    return read


def test_the_model_makes_different_queries_of_several_kinds(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(*EVERY_WORD)
    rows = prepared(tokenizer, tmp_path).self_made
    assert len(rows) == 12 and len({row["kind"] for row in rows}) >= 4
    assert {row["kind"] for row in rows} <= set(SEEDS)
    words = [set(normalise(row["text"]).split()) for row in rows]
    assert all(words) and all(len(a & b) < 0.8 * len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert rows == prepared(tokenizer, tmp_path).self_made
    assert rows != prepared(tokenizer, tmp_path, settings=DistillationSettings(new_tokens=4, seed=1)).self_made


def test_a_block_of_examples_is_continued_with_the_templates_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer("Review")
    texts = [f"{'very ' * i}fine film Label : yes" for i in range(4)] + ["dull plot", "Label : no"]
    read = scripted(monkeypatch, tokenizer, texts)
    options = {"template": "Review : {text} Label :", "self_queries": 3}
    rows = prepared(tokenizer, tmp_path, text=f"Review : {TEXT}", **options).self_made
    assert [row["text"] for row in rows] == ["fine film", "very fine film", "dull plot"]  # "very very" is a repeat
    assert {row["kind"] for row in rows} == {"example"}
    assert read[0][0] == tokenizer("Review :").input_ids
    assert {row["kind"] for row in prepared(tokenizer, tmp_path, **options).self_made} <= set(SEEDS)  # no examples


def test_labels_quotes_and_numbers_of_an_answer_are_left_out() -> None:
    cases = {
        '1. "What is dull?"': "What is dull?",
        "Question: Which film?": "Which film?",
        "\n\n* Name the plot.\nAnd more": "Name the plot.",
        "Write: a poem": "a poem",
        "Make it: short": "Make it: short",
        "Say it. And then": "Say it.",
        "Here is a list:": "",
        "  ": "",
    }
    assert {text: module._one_query(text, "", "summary") for text in cases} == cases
    assert module._one_query("When is it? Is it? At", "", "question") == "When is it?"
    assert module._one_query(" a: b\n", "", "example") == "a: b"


def test_a_query_begins_with_the_words_that_the_model_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer()
    read = scripted(monkeypatch, tokenizer, ["film", "plot", "fine"])
    monkeypatch.setattr(module, "SEEDS", {"question": ("very", ("dull", "great"))})
    rows = prepared(tokenizer, tmp_path, chat=True, self_queries=3).self_made
    assert {row["text"].split()[0] for row in rows} <= {"dull", "great"}
    assert {tokenizer.decode(ids).split()[-1] for ids in read[0]} == {"dull", "great"}


def test_the_column_of_the_queries_can_have_any_name(tmp_path: Path) -> None:
    rows = prepared(tiny_tokenizer(*EVERY_WORD), tmp_path, text_column="kind").self_made
    assert len(rows) == 12 and not {row["kind"] for row in rows} & set(SEEDS)


def test_lines_end_with_line_breaks_alone(tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_bytes("one\u2028line\r\n\ntwo\x0clines\rthree\n".encode())
    rows = module.read_text_lines(tmp_path / "queries.txt", "text")
    assert [row["text"] for row in rows] == ["one\u2028line", "two\x0clines", "three"]


def test_a_long_text_is_shown_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 20)  # its three thirds are equal
    seen = []
    original = Teacher.generate

    def generate(self: Teacher, asked: Any, seed: Any, speaker: Any, **options: Any) -> Any:
        seen.extend(speaker[1])
        return original(self, asked, seed, speaker, **options)

    monkeypatch.setattr(Teacher, "generate", generate)
    tokenizer = tiny_tokenizer(*EVERY_WORD)
    teacher = prepared(tokenizer, tmp_path).teacher
    names = [name for name in teacher.model.prompts.names if name.startswith("part-")]
    assert set(seen) == set(names) and len(names) == 2
    assert torch.equal(torch.cat([teacher.model.prompts[name] for name in names]), teacher.model.prompts["text"])


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_with_a_chat_is_asked_in_the_users_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    tokenizer = chat_tokenizer()
    read = scripted(monkeypatch, tokenizer, ["film", "plot", "fine"])
    made = prepared(tokenizer, tmp_path, chat=chat, self_queries=3)
    assert [row["text"] for row in made.self_made] == ["film", "plot", "fine"]
    bank = made.teacher.model.prompts
    (shown,) = [bank[name] for name in bank.names if name.startswith("part-")]
    expected = made.teacher.model.get_input_embeddings()(
        tokenizer(f"system_turn {TEXT}", return_tensors="pt").input_ids
    )
    assert torch.equal(shown, expected[0])
    asked = tokenizer.decode(read[0][0])
    assert asked.startswith("</s> user_turn") and asked.endswith("</s> assistant_turn")


def test_a_chat_template_without_an_opening_keeps_bos() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['role'] }}_turn ", "")
    bos, *rest = tokenizer(f"</s> {TEXT}").input_ids
    source = SourceText([bos, *rest], 1, "{text}")
    (part,) = query_starts(tokenizer, source)[1]
    assert part == [bos, *rest] and source.in_chat(tokenizer).frame == 1


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no system prompt') }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",  # begins no answer
    ],
)
def test_a_model_whose_chat_template_does_not_fit_is_asked_without(template: str | None) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    source = SourceText(tokenizer(TEXT).input_ids, 0, "{text}")
    starts, (part,) = query_starts(tokenizer, source)
    assert part == source.ids and list(starts) == list(SEEDS)
    assert starts["summary"][0][1] == source.asking(tokenizer, SEEDS["summary"][0], SEEDS["summary"][1][0])


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("Q:", "Read this.\nQ: who?\nA: me\n", True),
        ("\n\nQ:", "Read this.\n\n  Q: who?", True),
        ("Q:", "The FAQ: ask. See Q: here", False),
        ("A", "An apple", False),
        ("A", "A film", True),
        ("-", "- a list\n- of things", False),
        ("", "A film", False),
    ],
)
def test_a_line_that_begins_with_the_templates_words_is_an_example(words: str, text: str, found: bool) -> None:
    letters = byte_bpe()
    source = SourceText(letters(text).input_ids, 0, words + "{text}")
    assert (list(query_starts(letters, source)[0]) == ["example"]) is found


def test_a_model_that_repeats_itself_makes_fewer_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    read = scripted(monkeypatch, tokenizer, ["film", "Film .", "plot", "great"])
    with caplog.at_level(logging.WARNING):
        assert len(prepared(tokenizer, tmp_path, self_queries=40).self_made) == 3
    assert "3 different queries" in caplog.text and sum(map(len, read)) < DRAWS * 40 + module.CHUNK
    scripted(monkeypatch, tokenizer, ["film"])
    with pytest.raises(ValueError, match=r"made 1 different queries in \d+ tries, too few to train on; give queries"):
        prepared(tokenizer, tmp_path)


def test_given_and_self_made_queries_are_trained_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    scripted(monkeypatch, tokenizer, ["film", "plot", "fine", "great", "dull film very"])
    compressed(tmp_path, tokenizer=tokenizer, queries=queries(6), self_queries=4, steps=1, init="text")
    lines = (tmp_path / "queries.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["film", "plot", "fine", "great"]
    report = json.loads((tmp_path / "retention.json").read_text())
    assert report["training_queries"] + report["held_out_queries"] == 10


def test_self_made_queries_need_one_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="self-made queries need a template with one column, got a, b"):
        prepared(tiny_tokenizer(), tmp_path, template="{a} {b}")


def test_rows_without_text_and_repeats_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": "  "}, {"text": "a"}]
    with caplog.at_level(logging.WARNING):
        assert usable_queries(TASK, rows) == [{"text": "a"}, {"text": "b"}]
    assert "3 of 5 queries are left out: no text (rows 1, 3); repeated (row 4)" in caplog.text


def test_a_text_file_has_a_query_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text("fine film\n\n  \nvery dull\n")
    rows = read_text_lines(file, "question")
    assert rows == [{"question": "fine film"}, {"question": "very dull"}]
    assert str(rows.origins[1]) == f"{file}, line 4"
