"""Puts encoded rows into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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
