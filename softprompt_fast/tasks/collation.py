"""Puts encoded rows into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .encoding import IGNORED


@dataclass
class Collator:
    """Pads features on the right; counts their tokens and targets on the host, so that no step waits for a GPU.

    Features may name their ``prompt``, and the ``group`` (task) whose loss they use.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(feature["input_ids"]) for feature in features]
        batch: dict[str, Any] = {
            "input_ids": self._pad([f["input_ids"] for f in features], self.pad_token_id),
            "attention_mask": self._pad([[1] * length for length in lengths], 0),
            "lengths": lengths,
        }
        if "token_type_ids" in features[0]:
            batch["token_type_ids"] = self._pad([f["token_type_ids"] for f in features], 0)
        if "labels" in features[0]:
            batch["labels"] = self._pad([f["labels"] for f in features], IGNORED)
            batch["num_targets"] = sum(label != IGNORED for f in features for label in f["labels"])
        if "prompt" in features[0]:
            batch["prompt_ids"] = [feature["prompt"] for feature in features]
            batch["groups"] = [feature["group"] for feature in features]
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def pad_token_id(tokenizer: Any) -> int:
    """The padding token, or any other token if a tokenizer has none: nothing reads padding."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def length_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row indices: rows of similar length together, longest first, so that memory peaks at the start."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, side: str = "right", value: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, [B, T] each; padding holds ``value``, which nothing reads."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.int64)
        mask[i, columns] = 1
    return ids.to(device), mask.to(device)
