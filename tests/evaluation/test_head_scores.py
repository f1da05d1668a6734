"""Scores of heads: entities of BIO tags, answers as SQuAD compares them, and the best span."""

from __future__ import annotations

import pytest
import torch

from softprompt_fast.evaluation.head_results import best_span, result_of, tags_of
from softprompt_fast.evaluation.scores import describe_scores, main_score, rank
from softprompt_fast.evaluation.spans import answer_f1, are_bio, entities, exact_match
from softprompt_fast.tasks.head_encoding import Part
from softprompt_fast.tasks.head_tasks import answering_task, tagging_task


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", {("A", 0, 2), ("B", 3, 4)}),
        ("B-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),
        ("I-A I-A O", {("A", 0, 2)}),
        ("B-A I-B I-B", {("A", 0, 1), ("B", 1, 3)}),
        ("O O", set()),
    ],
)
def test_entities_are_those_of_conll(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_which_labels_are_bio_tags() -> None:
    assert are_bio(["B-A", "I-A", "O"]) and are_bio(["B-A", "O"])
    assert not are_bio(["O"]) and not are_bio(["NOUN", "VERB"]) and not are_bio(["0", "1"])


def test_answers_are_compared_as_in_squad() -> None:
    assert exact_match("The Rome!", ["rome"]) and not exact_match("in Rome", ["rome", "oslo"])
    assert answer_f1("in Rome", ["rome", "oslo"]) == pytest.approx(2 / 3)
    assert answer_f1("a", ["the"]) == 1.0 and answer_f1("", ["rome"]) == 0.0
    assert answer_f1("x y", ["y z", "x y z"]) == pytest.approx(0.8)


def part(offsets: list[tuple[int, int] | None]) -> Part:
    return Part([0] * len(offsets), offsets=tuple(offsets))


def test_the_best_span_begins_before_it_ends_and_is_in_the_context() -> None:
    context = part([None, (0, 3), (4, 7), (8, 11)])
    start = torch.tensor([9.0, 0, 1, 5], dtype=torch.float64)
    end = torch.tensor([9.0, 4, 3, 0], dtype=torch.float64)
    first, last, score = best_span([context], [torch.stack([start, end])], 30)
    assert (first, last) == (8, 11)  # the end before the start, 5 + 4, would be the largest sum
    inside = start[1:].softmax(0), end[1:].softmax(0)
    assert score == pytest.approx(float(inside[0][2] * inside[1][2]))


def test_a_span_is_not_longer_than_allowed_and_the_best_of_all_parts() -> None:
    one, two = part([(0, 3), (4, 7), (8, 11)]), part([(8, 11), (12, 15)])
    numbers = torch.tensor([[3.0, 0, 0], [0.0, 0, 3]], dtype=torch.float64)
    assert best_span([one], [numbers], 3)[:2] == (0, 11)
    assert best_span([one], [numbers], 2)[:2] == (0, 3)
    better = torch.tensor([[0.0, 4], [0.0, 4]], dtype=torch.float64)
    assert best_span([one, two], [numbers, better], 3)[:2] == (12, 15)


def test_an_answer_has_no_spaces_at_its_ends() -> None:
    row = {"question": "who ?", "context": "so  ann .", "answers": "ann"}
    numbers = torch.tensor([[0.0, 9, 0], [0.0, 9, 0]], dtype=torch.float64)
    result = result_of(answering_task(), row, [part([(0, 2), (2, 7), (7, 9)])], [numbers])
    assert (result["prediction"], result["start"], result["end"]) == ("ann", 4, 7) and result["score"] > 0.9


def test_words_of_several_parts_get_their_tags() -> None:
    task = tagging_task([{"tokens": ["a"], "tags": ["O", "B-A"]}])
    parts = [Part([1, 2, 3], words=(0, 1), columns=(0, 2)), Part([1], words=(3,), columns=(0,))]
    outputs = [torch.tensor([[5.0, 0], [0, 0], [0, 5]]), torch.tensor([[5.0, 0]])]
    tags, probabilities = tags_of(task, 4, parts, outputs)
    assert task.labels == ["B-A", "O"] and tags == ["B-A", "O", "O", "B-A"]
    assert probabilities[2] is None and probabilities[0] == pytest.approx(0.9933, abs=1e-4)


def test_the_score_that_counts() -> None:
    tags = {"accuracy": 0.9, "span_f1": 0.5, "loss": 1.0, "rows": 3}
    answers = {"exact_match": 0.5, "f1": 0.7, "loss": 1.0, "rows": 3}
    assert [main_score(x) for x in (tags, answers, {"loss": 1.0})] == ["span_f1", "exact_match", None]
    assert rank(tags, "accuracy") == (0.5, -1.0) and rank(tags, "loss") == (-1.0,)
    assert describe_scores(tags) == "span f1 0.500 (3 rows), accuracy 0.900"
    assert describe_scores(answers | {"exact_match_low": 0.1, "exact_match_high": 0.9}).startswith(
        "exact match 0.500 (95 % interval 0.100 to 0.900, 3 rows), f1 0.700"
    )
