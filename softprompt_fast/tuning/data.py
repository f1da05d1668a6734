"""Rows of data from files or the hub, their encoding, and batches of them."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..task import Task, encode_text

logger = logging.getLogger("softprompt_fast")

READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}
Rows = list[dict[str, Any]]


def load_rows(source: str, split: str = "train") -> Rows:
    """Rows of a jsonl, json, csv, tsv or parquet file, or of a data set of the hub.

    Raises:
        ValueError: an unknown kind of file, one that cannot be read, or no rows.
        FileNotFoundError: something that looks like a file but is none.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    if path.suffix in READERS:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        builder, options = READERS[path.suffix]
        try:
            data = load_dataset(builder, data_files=str(path), split="train", **options)
        except DatasetsError as error:
            raise ValueError(f"{source} could not be read: {error.__cause__ or error}") from error
    elif path.exists():
        raise ValueError(f"{source} must be a {', '.join(READERS)} file or the name of a data set on the hub")
    else:
        data = load_dataset(source, split=split)
    rows = [dict(row) for row in data]
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


def split_rows(rows: Rows, held_out: float | int, seed: int = 0) -> tuple[Rows, Rows]:
    """Shuffles with a seed and holds out a share (below 1) or a number of rows."""
    count = round(len(rows) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(rows):
        raise ValueError(f"`held_out` must leave rows on both sides of {len(rows)}, got {held_out}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def digest(rows: Rows) -> str:
    """Tells whether two lists of rows are alike."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


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


def encode(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False) -> Rows:
    """Training features: ``input_ids`` and ``labels``, -100 on the text for decoders."""
    features: Rows = []
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


@dataclass
class Collator:
    """Pads features on the right; counts their tokens and targets on the host, so that no step waits for a GPU.

    Features may name their ``prompt``, and the ``group`` (task) whose loss they have.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(feature["input_ids"]) for feature in features]
        batch: dict[str, Any] = {
            "input_ids": self._pad([f["input_ids"] for f in features], self.pad_token_id),
            "attention_mask": self._pad([[1] * length for length in lengths], 0),
            "lengths": lengths,
        }
        if "labels" in features[0]:
            batch["labels"] = self._pad([f["labels"] for f in features], -100)
            batch["num_targets"] = sum(label != -100 for f in features for label in f["labels"])
        if "prompt" in features[0]:
            batch["prompt_ids"] = [feature["prompt"] for feature in features]
            batch["groups"] = [feature["group"] for feature in features]
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def pad_token_id(tokenizer: Any) -> int:
    """The padding token, or any other where a tokenizer has none: padding is never looked at."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def length_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row indices, rows of similar length together, longest first so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
