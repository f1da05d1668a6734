"""What a head's numbers mean for a row: probabilities of labels, a tag for each word, the best part of a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tasks.head import SEQUENCE
from ..tasks.head_encoding import Part
from ..tasks.task import Task

Outputs = Sequence[Tensor]
"""The numbers of each part of a row, float64 on the host: [C], [T, C], or [2, T] (starts and ends)."""
NO_TAG = "O"
"""The tag of a word that has no token, if the task has it."""


def result_of(task: Task, row: Any, parts: Sequence[Part], outputs: Outputs) -> dict[str, Any]:
    """The answer of a head to a row.

    Returns:
        Classification: ``prediction`` and ``scores``. Tagging: ``prediction``, a tag for each word, and ``scores``, the
        probability of each. Answering: ``prediction``, its ``score``, and ``start`` and ``end``, its characters in the
        context.
    """
    assert task.head is not None
    if task.head.name == SEQUENCE:
        probabilities = outputs[0].softmax(-1).tolist()
        scores = dict(zip(task.labels, probabilities, strict=True))
        return {"prediction": max(scores, key=scores.__getitem__), "scores": scores}
    if task.kind == "tagging":
        tags, probabilities = tags_of(task, len(task.words(row)), parts, outputs)
        return {"prediction": tags, "scores": probabilities}
    start, end, score = best_span(parts, outputs, task.head.answer_tokens)
    column = task.columns[-1]
    context = task.cell(row[column], column)
    start, end = _without_spaces(context, start, end)
    return {"prediction": context[start:end], "score": score, "start": start, "end": end}


def tags_of(
    task: Task, words: int, parts: Sequence[Part], outputs: Outputs
) -> tuple[list[str | None], list[float | None]]:
    """The likeliest tag of each word and its probability. A word without a token has the tag O, or none."""
    tags: list[str | None] = [NO_TAG if NO_TAG in task.labels else None] * words
    probabilities: list[float | None] = [None] * words
    for part, logits in zip(parts, outputs, strict=True):
        best = logits[list(part.columns)].softmax(-1).max(-1)
        for word, value, place in zip(part.words, best.values.tolist(), best.indices.tolist(), strict=True):
            tags[word], probabilities[word] = task.labels[place], value
    return tags, probabilities


def best_span(parts: Sequence[Part], outputs: Outputs, answer_tokens: int) -> tuple[int, int, float]:
    """The characters of the likeliest answer, and its probability among all starts and all ends in the context."""
    found: list[tuple[float, int, int]] = []
    starts, ends = [], []
    for part, logits in zip(parts, outputs, strict=True):
        inside = [i for i, span in enumerate(part.offsets) if span is not None]
        start, end = logits[:, inside]
        starts.append(start)
        ends.append(end)
        pairs = (start[:, None] + end[None, :]).triu().tril(answer_tokens - 1)
        allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(answer_tokens - 1)
        place = int(pairs.masked_fill(~allowed, -torch.inf).argmax())
        first, last = divmod(place, len(inside))
        spans = part.offsets[inside[first]], part.offsets[inside[last]]
        assert spans[0] is not None and spans[1] is not None
        found.append((float(pairs[first, last]), spans[0][0], spans[1][1]))
    score, start_character, end_character = max(found)
    norm = torch.cat(starts).logsumexp(0) + torch.cat(ends).logsumexp(0)
    return start_character, end_character, (torch.tensor(score, dtype=torch.float64) - norm).exp().item()


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """A part of a text without spaces at its ends: some tokenizers count a space to the word after it."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
