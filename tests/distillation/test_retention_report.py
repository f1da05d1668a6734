"""The report: free continuations, scores of the caller's own, and the page."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.pages import check_alone
from support.tiny_models import VOCABULARY, build
from support.tiny_reviews import WORDS, tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, compressed, queries

import softprompt_fast as spf
from softprompt_fast.distillation import write_page
from softprompt_fast.distillation.continuations import free_continuations
from softprompt_fast.distillation.initial_values import values_from_text
from softprompt_fast.distillation.page import html_page
from softprompt_fast.distillation.report import print_result
from softprompt_fast.distillation.result import Compression
from softprompt_fast.distillation.retention import Contestant, Retention
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.tables import cost_table, retention_table
from softprompt_fast.distillation.teacher import Teacher
from softprompt_fast.evaluation.overlap import rouge_l
from softprompt_fast.tasks.encoding import token_ids
from softprompt_fast.tasks.examples import split_rows

TOKENIZER = tiny_tokenizer(*(f"word{i}" for i in range(len(WORDS), VOCABULARY)))
"""Every token of the models is a word, so texts differ where tokens do."""
IDS = token_ids(TOKENIZER, TEXT)
NEW_TOKENS = 5


def same_first_word(teacher: list[str], student: list[str]) -> float:
    return sum(a.split()[:1] == b.split()[:1] for a, b in zip(teacher, student, strict=True)) / len(teacher)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Compression:
    output = tmp_path_factory.mktemp("report")
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "new_tokens": NEW_TOKENS, "steps": 40, "learning_rate": 0.1}
    return compressed(output, tokens=[2, 4], free_continuations=3, scorer=same_first_word, **options)


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama")


def teacher_of(model: Any, **settings: Any) -> Teacher:
    return Teacher(model, TOKENIZER, IDS, DistillationSettings(new_tokens=NEW_TOKENS, **settings), None)


def targets_of(teacher: Teacher) -> Any:
    return teacher.targets([token_ids(TOKENIZER, TEMPLATE.format(**row)) for row in queries(6)])


@torch.no_grad()
def said(model: Any, ids: list[int], **options: Any) -> str:
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    return TOKENIZER.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_scores_are_those_of_what_the_saved_prompt_says(result: Compression, base: Any) -> None:
    held_out = split_rows(queries(), 0.2, 0)[1]
    assert result.held_out_queries == 5 and result.free_queries == 3
    asked = [token_ids(TOKENIZER, TEMPLATE.format(**held_out[i])) for i in (0, 1, 3)]
    teacher = [said(base, IDS + query) for query in asked]
    found = {}
    for prompt in result.prompts:
        tuned = spf.SoftPromptModel.from_pretrained(base, prompt.folder)
        found[prompt.retention.label] = (
            prompt.retention,
            [said(tuned, query, prompt_ids=tuned.prompts.names[0]) for query in asked],
        )
    bare = next(one for one in result.references if one.label == "nothing")
    found["nothing"] = bare, [said(base, query) for query in asked]
    for measured, texts in found.values():
        assert measured.rouge_l == pytest.approx(sum(map(rouge_l, teacher, texts)) / 3)
        assert measured.same_text == pytest.approx(sum(a == b for a, b in zip(teacher, texts, strict=True)) / 3)
        assert measured.scores == {"same_first_word": pytest.approx(same_first_word(teacher, texts))}
    assert any(0 < (measured.rouge_l or 0) < 1 for measured, _ in found.values())


def test_the_whole_text_says_what_it_says(result: Compression) -> None:
    whole = result.references[0]
    assert (whole.label, whole.rouge_l, whole.same_text) == ("whole text", 1.0, 1.0)
    assert whole.scores == {"same_first_word": 1.0}


@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_a_student_with_the_whole_text_says_the_same(form: str, base: Any) -> None:
    teacher = teacher_of(base, batch_size=4)
    student = (spf.DeepPromptModel if form == "kv" else spf.SoftPromptModel)(base)
    student.add_prompt("all", init=values_from_text(student, IDS, len(IDS), "text"))
    student.add_prompt("some", init=values_from_text(student, IDS, 2, "text"))
    free = free_continuations(teacher, targets_of(teacher), teacher.settings)
    before = Retention("student", len(IDS), agreement=0.0, kl=0.0, first_token=0.0)
    found = free.of(Contestant("student", len(IDS), student, "all"), before)
    assert found == replace(before, rouge_l=1.0, same_text=1.0)
    assert free.of(Contestant("student", 2, student, "some"), before) != found


def test_free_texts_are_greedy_if_the_training_samples(base: Any) -> None:
    greedy, sampled = teacher_of(base), teacher_of(base, continuation="sampled", batch_size=4, seed=3)
    drawn = targets_of(sampled)
    expected = free_continuations(greedy, targets_of(greedy), greedy.settings)
    found = free_continuations(sampled, drawn, sampled.settings)
    assert found.texts == expected.texts and found.queries == expected.queries
    assert [target.continuation for target in drawn] != [target.continuation for target in targets_of(greedy)]


def test_free_continuations_can_be_left_out(tmp_path: Path) -> None:
    result = compressed(tmp_path, steps=1, init="text", free_continuations=0)
    assert result.free_queries == 0
    stored = json.loads((tmp_path / "retention.json").read_text())
    assert stored["references"][0]["rouge_l"] is None and stored["prompts"][0]["retention"]["same_text"] is None
    assert "ROUGE-L" not in retention_table(result).heads and "ROUGE-L" not in html_page(result)
    assert "ROUGE-L" not in (result.recommended.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("scorer", "changes", "error", "message"),
    [
        (3, {}, TypeError, "`scorer` must be a function of two lists of texts, got 3"),
        (
            same_first_word,
            {"free_continuations": 0},
            ValueError,
            "`scorer` cannot be combined with `free_continuations` 0",
        ),
        (lambda a, b: None, {}, TypeError, "`scorer` must return a number, got None"),
        (lambda a, b: float("nan"), {}, ValueError, "`scorer` must return a finite number, got nan"),
    ],
)
def test_a_scorer_is_refused_before_the_training(
    scorer: Any, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        compressed(tmp_path / "out", scorer=scorer, **changes)
    assert not (tmp_path / "out" / "prompt").exists()


def test_a_scorer_that_fails_after_the_training_costs_only_its_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def strict(teacher: list[str], student: list[str]) -> float:
        if teacher != student:
            raise RuntimeError("no such text")
        return 1.0

    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        result = compressed(tmp_path, steps=1, init="text", scorer=strict)
    nothing = next(one for one in result.references if one.label == "nothing")
    assert nothing.scores == {} and nothing.rouge_l is not None
    assert "`scorer` gives no score of nothing (0 tokens): RuntimeError('no such text')" in caplog.text
    assert retention_table(result).rows[1][-1] == "" and retention_table(result).rows[0][-1] == "1.000"
    assert (tmp_path / "retention.json").is_file()


def test_the_page_holds_each_number(result: Compression, tmp_path: Path) -> None:
    page = write_page(result, tmp_path / "new" / "retention.html").read_text()
    reader = check_alone(page)
    assert reader.tags.count("svg") == 1 and reader.used and "#000000" not in page
    for table in (retention_table(result), cost_table(result)):
        assert table.title in page
        flat = [cell for row in table.rows for cell in row]
        assert any(reader.cells[i : i + len(flat)] == flat for i in range(len(reader.cells))), table.title
    kept = [*result.references, *(prompt.retention for prompt in result.prompts)]
    for one in kept:
        assert one.rouge_l is not None and one.same_text is not None
        for value in (one.agreement, one.kl, one.first_token, one.rouge_l, one.same_text, *one.scores.values()):
            assert f"{value:.3f}" in reader.cells
    assert '<div class="status fine">' in page
    nothing = replace(result.recommended, retention=replace(result.recommended.retention, kl=9.0))
    assert '<div class="status few">' in html_page(replace(result, recommended=nothing))
    assert all(note in page for note in result.notes) and "same_first_word" in page
    names = [*vars(result.settings), "max_drop"]
    assert set(names) <= set(reader.cells) and str(result.prompts[0].learning_rate) in reader.cells


def test_the_page_escapes_text_and_names_no_folder_of_the_machine(result: Compression) -> None:
    one = result.prompts[0]
    named = replace(one, retention=replace(one.retention, label="<b>2 & 3</b>"), folder=Path("/home/<i>me/<u>p"))
    whole = replace(result.references[0], scores={"<lambda>": 1.0})
    page = html_page(
        replace(
            result,
            prompts=[named, result.prompts[1]],
            references=[whole, *result.references[1:]],
            settings=replace(result.settings, init="/home/me/old<s>"),
        )
    )
    reader = check_alone(page)
    assert not {"b", "i", "u", "s", "lambda"} & set(reader.tags)
    assert "&lt;b&gt;2 &amp; 3&lt;/b&gt;" in page and "<th>&lt;lambda&gt;</th>" in page
    assert "<b>2 & 3</b>" in reader.cells and "<u>p" in reader.cells and "/home" not in page


def test_the_terminal_shows_names_as_they_are(result: Compression) -> None:
    whole = replace(result.references[0], scores={"[red]mine": 0.25})
    buffer = io.StringIO()
    print_result(replace(result, references=[whole, *result.references[1:]]), Console(file=buffer, width=160))
    shown = buffer.getvalue()
    assert "ROUGE-L" in shown and "same text" in shown and "[red]mine" in shown and "0.250" in shown
    assert "Retention on 5 held-out queries; free continuations of 3" in shown and "recommended: " in shown
