"""Rows for a head as token ids: whole texts, the words of a tagging task, or a question with its context.

A row that is too long is read in parts. The words of a row are divided, so that every word gets a tag. A context is
read in windows that overlap, each with the whole question. The text of a classification is cut instead, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cuts import counting_cuts, current_cuts
from .encoding import IGNORED, checked, encode_text
from .examples import Examples
from .head import ANSWERS, SEQUENCE
from .task import Task

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What the model reads at once: a row, or a part of a long one."""

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    """None: all are 0, or the tokenizer has no types."""
    words: tuple[int, ...] = ()
    """Tagging: the index in the row of each word of the part that has a token."""
    columns: tuple[int, ...] = ()
    """Tagging: the first token of each of these words."""
    offsets: tuple[Span | None, ...] = ()
    """Answering: the characters of the context that each token covers; None: another token."""


def encode_parts(task: Task, row: Mapping[str, Any], tokenizer: Any) -> list[Part]:
    """The parts of a row, each at most ``task.max_length`` tokens.

    Raises:
        ValueError: no text, or a question that leaves no room for the context.
        TypeError: words or answers need a tokenizer that knows the characters of its tokens.
    """
    assert task.head is not None
    if task.head.name == SEQUENCE:
        return [Part(encode_text(task, row, tokenizer))]
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"`tokenizer` must be a fast one, which knows the characters of its tokens, got {type(tokenizer).__name__}"
        )
    return _question_parts(task, row, tokenizer) if task.head.name == ANSWERS else _word_parts(task, row, tokenizer)


def features_of(task: Task, row: Mapping[str, Any], parts: Sequence[Part]) -> Examples:
    """Training features of a labelled row: ``input_ids``, ``token_type_ids`` if there are any, and ``labels``.

    Labels are the class, alone in a list; a class for each token; or the first and last token of the answer. A part of
    a context that does not hold the answer is left out.
    """
    assert task.head is not None
    features: Examples = []
    answer = answer_tokens(parts, task.answers(row)) if task.head.name == ANSWERS else None
    tags = [task.labels.index(tag) for tag in task.tags(row)] if task.kind == "tagging" else []
    for number, part in enumerate(parts):
        feature: dict[str, Any] = {"input_ids": part.input_ids}
        if part.token_type_ids is not None:
            feature["token_type_ids"] = part.token_type_ids
        if task.head.name == SEQUENCE:
            feature["labels"] = [task.labels.index(task.label(row))]
        elif task.kind == "tagging":
            feature["labels"] = [IGNORED] * len(part.input_ids)
            for word, column in zip(part.words, part.columns, strict=True):
                feature["labels"][column] = tags[word]
        else:
            if answer is None or number not in answer:
                continue
            feature["labels"] = list(answer[number])
        features.append(feature)
    return features


def encode_for_head(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Examples:
    """The training features of labelled rows."""
    with counting_cuts():
        return [feature for row in rows for feature in features_of(task, row, encode_parts(task, row, tokenizer))]


def answer_tokens(parts: Sequence[Part], answers: Sequence[tuple[str, int]]) -> dict[int, Span]:
    """First and last token of the first answer, for each part that holds all of it."""
    text, start = answers[0]
    end = start + len(text)
    found = {}
    for number, part in enumerate(parts):
        inside = [i for i, span in enumerate(part.offsets) if span is not None and span[0] < end and start < span[1]]
        if not inside:
            continue
        first, last = part.offsets[inside[0]], part.offsets[inside[-1]]
        assert first is not None and last is not None
        if first[0] <= start and end <= last[1]:
            found[number] = (inside[0], inside[-1])
    return found


def _word_parts(task: Task, row: Mapping[str, Any], tokenizer: Any) -> list[Part]:
    words = [checked(word) for word in task.words(row)]
    parts = []
    at = 0
    while at < len(words):
        part, fitting = _words_from(task, words, at, tokenizer)
        parts.append(part)
        at += fitting
    current_cuts().count_part(len(parts) > 1)
    return parts


def _words_from(task: Task, words: Sequence[str], at: int, tokenizer: Any) -> tuple[Part, int]:
    """The part that begins with a word, and how many words it holds."""
    count = len(words) - at
    while True:
        some = words[at : at + count]
        encoded = tokenizer(
            " ".join(some), truncation=False, add_special_tokens=task.special_tokens, return_offsets_mapping=True
        )
        ids, offsets = list(encoded.input_ids), encoded.offset_mapping
        columns = _first_tokens(some, offsets)
        if len(ids) <= task.max_length:
            break
        if count == 1:  # one word alone is too long: its first tokens say its tag
            ids = ids[: task.max_length]
            columns = {word: column for word, column in columns.items() if column < task.max_length}
            break
        special = sum(start == end for start, end in offsets)
        room = max(1, task.max_length - special)
        first = next((i for i, (start, end) in enumerate(offsets) if end > start), 0)
        fitting = sum(columns.get(word, -1) - first < room for word in range(count))
        count = max(1, min(fitting, count - 1))
    return Part(ids, words=tuple(at + word for word in columns), columns=tuple(columns.values())), count


def _first_tokens(words: Sequence[str], offsets: Sequence[Span]) -> dict[int, int]:
    """The first token of each word that has one, in the text of all words with spaces between them."""
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    columns: dict[int, int] = {}
    number = 0
    for column, (start, end) in enumerate(offsets):
        while number < len(spans) - 1 and start < end and spans[number][1] <= start:
            number += 1
        # A token may begin with the space before a word, or hold several words.
        later = number
        while later < len(spans) and spans[later][0] < end:
            if start < spans[later][1]:
                columns.setdefault(later, column)
            later += 1
    return columns


def _question_parts(task: Task, row: Mapping[str, Any], tokenizer: Any) -> list[Part]:
    assert task.head is not None
    question, context = (checked(task.cell(row[column], column)) for column in _two_columns(task, row))
    if not context.strip() or not question.strip():
        raise ValueError("the text is empty")
    separated = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    encoded = tokenizer(
        question if separated else f"{question}\n",
        context,
        truncation=False,
        add_special_tokens=task.special_tokens,
        return_offsets_mapping=True,
    )
    ids, sequences = list(encoded.input_ids), encoded.sequence_ids()
    types = encoded.get("token_type_ids")
    inside = [i for i, sequence in enumerate(sequences) if sequence == 1]
    if not inside:
        raise ValueError("the context has no tokens")
    first, last = inside[0], inside[-1] + 1
    room = task.max_length - first - (len(ids) - last)
    long = last - first > room
    if long and room <= task.head.stride:
        raise ValueError(
            f"`max_length` must be larger than the question's {first} tokens and `stride` {task.head.stride} together, "
            f"got {task.max_length}"
        )
    current_cuts().count_part(long)
    parts = []
    for start in range(first, last, room - task.head.stride if long else last - first):
        end = min(start + room, last) if long else last
        chosen = [*range(first), *range(start, end), *range(last, len(ids))]
        spans = [tuple(encoded.offset_mapping[i]) if sequences[i] == 1 else None for i in chosen]
        parts.append(
            Part(
                [ids[i] for i in chosen],
                [types[i] for i in chosen] if types is not None and any(types) else None,
                offsets=tuple(spans),
            )
        )
        if end == last:
            break
    return parts


def _two_columns(task: Task, row: Mapping[str, Any]) -> list[str]:
    for column in task.columns:
        if column not in row:
            raise ValueError(f"no column {column!r} in the data, which has {list(row)}")
    return task.columns
