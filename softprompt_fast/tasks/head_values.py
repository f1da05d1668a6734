"""Cells of rows for a head: lists of words and tags, and answers that are parts of a context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .values import is_missing, label_name, shown, text_of


def words_of(value: Any, column: str) -> list[str]:
    """The words, or tags, of a cell: those of a list, of a text that is a JSON list, or of a text with spaces.

    Raises:
        ValueError: another value, or a list that holds one.
    """
    value = _listed(value)
    if isinstance(value, str):
        value = _json_of(value, "[") if value.lstrip().startswith("[") else value.split()
    if isinstance(value, (list, tuple)):
        return [label_name(word, column) for word in value]
    if is_missing(value):
        return []
    raise ValueError(f"column {column!r} must hold a list of texts, got {type(value).__name__} {shown(value)}")


def answers_of(value: Any, context: str, column: str) -> list[tuple[str, int]]:
    """The answers of a cell, each with the place of its first character in the context.

    A cell holds a text, a mapping with ``text`` and ``answer_start`` (SQuAD's: lists of them), or a list of these. A
    text without a place means its first occurrence in the context.

    Raises:
        ValueError: no answer, another value, or an answer that is not in the context.
    """
    value = _listed(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _json_of(value, "{")
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        texts, starts = _listed(texts), _listed(starts)
        if isinstance(texts, (list, tuple)):
            places = starts if isinstance(starts, (list, tuple)) else [None] * len(texts)
            if len(places) != len(texts):
                raise ValueError(f"column {column!r} must hold as many answer_start as text, got {shown(value)}")
            found = [_placed(text, start, context, column) for text, start in zip(texts, places, strict=True)]
        else:
            found = [_placed(texts, starts, context, column)]
    elif isinstance(value, (list, tuple)):
        found = [answer for one in value for answer in answers_of(one, context, column)]
    else:
        found = [_placed(value, None, context, column)]
    if not found:
        raise ValueError(f"column {column!r} holds no answer")
    return found


def _listed(value: Any) -> Any:
    """A numpy array as a list; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _placed(text: Any, start: Any, context: str, column: str) -> tuple[str, int]:
    answer = text_of(text, column)
    if is_missing(answer):
        raise ValueError(f"column {column!r} holds no answer")
    if start is None:
        place = context.find(answer)
    else:
        place = int(start) if context[int(start) : int(start) + len(answer)] == answer else -1
    if place < 0:
        where = "" if start is None else f" at character {start}"
        raise ValueError(f"column {column!r} must hold a part of the context, got {shown(answer)}, which is not{where}")
    return answer, place


def _json_of(text: str, start: str) -> Any:
    """The list or mapping that a text is in JSON; else the words of the text, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text.split() if start == "[" else text
