"""Label words: where a word needs a space in front, and labels that cannot be told apart."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "IDEOGRAPHIC",
    "BOPOMOFO",
    "FULLWIDTH",
    "HALFWIDTH KATAKANA",
    "YI ",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
    "JAVANESE",
    "BALINESE",
)
"""Beginnings of the Unicode names of letters that follow other text without a space."""


def spaced(word: str, template: str = "") -> str:
    """A label's word as it follows a text: with a space in front where its script separates words by spaces.

    A word that begins with white space, and a word after a template that ends in white space, are used as they are.
    """
    if not word or word[0].isspace() or template[-1:].isspace():
        return word
    return word if unicodedata.name(word[0], "").startswith(UNSPACED) else f" {word}"


def begins_another(words: Iterable[Sequence[int]]) -> bool:
    """Whether the tokens of one word begin those of another, longer one."""
    ordered = sorted({tuple(word) for word in words})
    return any(after[: len(word)] == word for word, after in itertools.pairwise(ordered))


def alike(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, white space or Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        form = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold()).split())
        groups.setdefault(form, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def same_tokens(words: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Groups of labels whose words have the same tokens: only one label of a group can win."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for label, ids in words.items():
        groups.setdefault(tuple(ids), []).append(label)
    return [group for group in groups.values() if len(group) > 1]
