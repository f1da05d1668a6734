"""Rows of data from files or the hub, their encoding, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .examples import Examples
from .task import Task

logger = logging.getLogger("softprompt_fast")


def encode_target(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of what the model should say; ends with the end-of-sequence token where text is generated."""
    ids = list(tokenizer(task.target(row), add_special_tokens=False).input_ids)
    if encoder_decoder or task.kind == "generation":
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"`tokenizer` must have an end-of-sequence token to end answers, got {type(tokenizer).__name__}"
            )
        ids.append(tokenizer.eos_token_id)
    return ids[: task.max_length]


def encode(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False) -> Examples:
    """Training features: ``input_ids`` and ``labels``, -100 on the text for decoders."""
    features: Examples = []
    longest = 0
    for row in rows:
        text = encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder)
        target = encode_target(task, row, tokenizer, encoder_decoder=encoder_decoder)
        longest += len(text) >= task.max_length
        if encoder_decoder:
            features.append({"input_ids": text, "labels": target})
        else:
            features.append({"input_ids": text + target, "labels": [-100] * len(text) + target})
    if longest:
        logger.warning(
            "%d of %d texts reach max_length=%d and may lose their beginning", longest, len(rows), task.max_length
        )
    return features


def encode_text(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of a row's text, at most ``task.max_length``, the end kept: it asks the question."""
    ids = list(tokenizer(task.text(row), truncation=False, add_special_tokens=task.special_tokens).input_ids)
    if not encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # the answer follows here
    if len(ids) > task.max_length:
        ids = ids[-task.max_length :]
    return ids or [tokenizer.eos_token_id]


def label_token_ids(task: Task, tokenizer: Any) -> list[int] | None:
    """The token of each label's word; None: not a classification, a word of several tokens, or two words alike."""
    if task.kind != "classification":
        return None
    words = [list(tokenizer(word, add_special_tokens=False).input_ids) for word in task.label_words.values()]
    ids = [word[0] for word in words if len(word) == 1]
    return ids if len(set(ids)) == len(words) else None
