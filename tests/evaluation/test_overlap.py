"""ROUGE-L: by hand, and against another implementation."""

from __future__ import annotations

import random

import pytest

from softprompt_fast.evaluation.overlap import rouge_l


@pytest.mark.parametrize(
    "reference, text, expected",
    [
        # Lin (2004), section 3.1: the same words in another order share a shorter subsequence.
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("a b c d", "a c", 2 * 2 / (4 + 2)),
        ("Great plot!", "great PLOT", 1.0),
        ("Größe zählt", "größe zählt nicht", 2 * 2 / (2 + 3)),
        ("a a b", "a b b", 2 * 2 / (3 + 3)),
        ("a", "b", 0.0),
        ("a", "", 0.0),
        ("", "...", 0.0),
        ("...", "...", 1.0),
        ("", "", 1.0),
    ],
)
def test_by_hand(reference: str, text: str, expected: float) -> None:
    assert rouge_l(reference, text) == pytest.approx(expected)
    assert rouge_l(text, reference) == pytest.approx(expected)


def test_as_the_rouge_score_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    draw = random.Random(0)
    words = ["the", "a", "film", "plot", "is", "very,", "Dull", "Great."]
    for _ in range(50):
        one, other = (" ".join(draw.choices(words, k=n)) for n in (9, 6))
        assert rouge_l(one, other) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)
