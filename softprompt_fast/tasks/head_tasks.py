"""Tasks for a model with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import templates
from .containers import as_rows
from .head import ANSWER_TOKENS, ANSWERS, SEQUENCE, STRIDE, TAGS, Head, in_order, labels_of_checkpoint
from .head_values import words_of
from .rows import place
from .task import Task, labels_in
from .values import is_missing

MOST_TAGS = 500
"""Different tags in a column; more are probably not tags."""


def sequence_task(
    rows: Sequence[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str = "label",
    template: str | None = None,
    checkpoint_labels: Sequence[str] | None = None,
    **fields: Any,
) -> Task:
    """A classification by a sequence-classification head, with the labels that the rows hold.

    Args:
        template: None: the text alone.
        checkpoint_labels: the names of a trained head's outputs; they are used if the labels of the rows are among
            them.
    """
    labels = in_order(labels_in(as_rows(rows), label_column))
    head = Head(SEQUENCE, _named(labels, checkpoint_labels))
    template = templates.field(text_column) if template is None else template
    return Task("classification", template, label_column, head=head, **fields)


def tagging_task(
    rows: Sequence[Mapping[str, Any]],
    *,
    words_column: str = "tokens",
    tags_column: str = "tags",
    checkpoint_labels: Sequence[str] | None = None,
    **fields: Any,
) -> Task:
    """A tag for each word by a token-classification head, with the tags that the rows hold."""
    rows = as_rows(rows)
    if rows and tags_column not in rows[0]:
        raise ValueError(f"no column {tags_column!r} in the data, which has {list(rows[0])}")
    names: set[str] = set()
    for i, row in enumerate(rows):
        if not is_missing(row.get(tags_column)):
            try:
                names.update(words_of(row[tags_column], tags_column))
            except ValueError as error:
                raise ValueError(f"{place(rows, i)}: {error}") from error
    if len(names) > MOST_TAGS:
        raise ValueError(f"column {tags_column!r} holds {len(names)} different values; are they tags?")
    head = Head(TAGS, _named(in_order(list(names)), checkpoint_labels))
    return Task("tagging", templates.field(words_column), tags_column, head=head, **fields)


def answering_task(
    *,
    question_column: str = "question",
    context_column: str = "context",
    answers_column: str = "answers",
    stride: int = STRIDE,
    answer_tokens: int = ANSWER_TOKENS,
    **fields: Any,
) -> Task:
    """A question that a part of its context answers, found by a question-answering head."""
    template = f"{templates.field(question_column)}\n{templates.field(context_column)}"
    head = Head(ANSWERS, stride=stride, answer_tokens=answer_tokens)
    return Task("answering", template, answers_column, head=head, **fields)


def _named(labels: list[str], own: Sequence[str] | None) -> list[str]:
    return labels if own is None else labels_of_checkpoint(labels, own) or labels
