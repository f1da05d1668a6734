"""Tables of segments for the packing and attention ops."""

from __future__ import annotations

import torch
from torch import Tensor


def table(prefixes: list[tuple[int, int]], lengths: list[int], first: int) -> Tensor:
    """Rows of these lengths from slot `first` on, after prefixes (first slot, length)."""
    lines, at = [], first
    for length, prefix in zip(lengths, prefixes, strict=True):
        lines.append((at, length, *prefix))
        at += length
    return torch.tensor(lines, dtype=torch.int64).view(-1, 4)
