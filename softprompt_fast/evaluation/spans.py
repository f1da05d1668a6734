"""Scores of tags and of answers: entities of BIO tags, and SQuAD's exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

Entity = tuple[str, int, int]
"""Type, first word, and the word after the last."""
PREFIXES = ("B", "I")


def are_bio(labels: Sequence[str]) -> bool:
    """Whether labels are BIO tags: O, and B-x or I-x for some types."""
    rest = [label for label in labels if label != "O"]
    return bool(rest) and all(label[:2] in ("B-", "I-") and len(label) > 2 for label in rest)


def entities(tags: Sequence[str | None]) -> set[Entity]:
    """The entities of BIO tags, as CoNLL's evaluation reads them: an I- tag of another type begins one, too."""
    found = set()
    kind, start = "", 0
    for word, tag in enumerate([*tags, "O"]):
        prefix, _, name = (tag or "O").partition("-")
        if kind and (prefix != "I" or name != kind):
            found.add((kind, start, word))
            kind = ""
        if prefix in PREFIXES and not kind:
            kind, start = name, word
    return found


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, English articles and repeated spaces."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction is one of the answers."""
    return normalised(prediction) in map(normalised, answers)


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words of a prediction and of the answer that is most like it, 0 to 1."""
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers)


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))
