"""Rows of data as token ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .examples import Examples
from .task import Task

logger = logging.getLogger("softprompt_fast")

IGNORED = -100
"""The label of a token that no loss counts; transformers and PyTorch use the same number."""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def without_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids without the end-of-sequence token that some tokenizers append: the answer follows there."""
    ids = list(ids)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_text(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of a row's text, at most ``task.max_length``. The end is kept, because it asks the question."""
    ids = list(tokenizer(task.text(row), truncation=False, add_special_tokens=task.special_tokens).input_ids)
    if not encoder_decoder:
        ids = without_end(ids, tokenizer)
    if len(ids) > task.max_length:
        ids = ids[-task.max_length :]
    return ids or [tokenizer.eos_token_id]


def encode_target(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of what the model should say; ends with the end-of-sequence token where text is generated."""
    ids = token_ids(tokenizer, task.target(row))
    if encoder_decoder or task.kind == "generation":
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"`tokenizer` must have an end-of-sequence token to end answers, got {type(tokenizer).__name__}"
            )
        ids.append(tokenizer.eos_token_id)
    return ids[: task.max_length]


def encode(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False) -> Examples:
    """Training features: ``input_ids`` and ``labels``; for decoders, labels are ``IGNORED`` on the text."""
    features: Examples = []
    longest = 0
    for row in rows:
        text = encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder)
        target = encode_target(task, row, tokenizer, encoder_decoder=encoder_decoder)
        longest += len(text) >= task.max_length
        if encoder_decoder:
            features.append({"input_ids": text, "labels": target})
        else:
            features.append({"input_ids": text + target, "labels": [IGNORED] * len(text) + target})
    if longest:
        logger.warning(
            "%d of %d texts reach max_length=%d and may lose their beginning", longest, len(rows), task.max_length
        )
    return features


def label_words(task: Task, tokenizer: Any) -> list[list[int]]:
    """Token ids of each label's word; empty for a generation task."""
    return [token_ids(tokenizer, word) for word in task.label_words.values()]


def label_token_ids(task: Task, tokenizer: Any) -> list[int] | None:
    """The token of each label's word.

    Returns:
        None for a generation task, a word of several tokens, or two labels with the same token.
    """
    if task.kind != "classification":
        return None
    words = label_words(task, tokenizer)
    ids = [word[0] for word in words if len(word) == 1]
    return ids if len(set(ids)) == len(words) else None
