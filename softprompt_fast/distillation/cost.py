"""What a text in front of a request costs: time until the first token, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inference.engine import Engine
from ..inference.prompt_bank import PromptBank

ROUNDS = 3
NAME = "prompt"
MIDDLE_REQUESTS = 3
"""Requests that are timed, those of median length."""


def first_token_seconds(banks: Sequence[PromptBank], requests: Sequence[list[int]]) -> list[float]:
    """Median seconds until the first token of a single request, for each bank's prompt; measured in turns.

    Args:
        requests: token ids [T]; those of median length are timed.
    """
    order = sorted(requests, key=len)
    start = max(0, (len(order) - MIDDLE_REQUESTS) // 2)
    chosen = order[start : start + MIDDLE_REQUESTS]
    engines = [Engine(bank) for bank in banks]
    times: list[list[float]] = [[] for _ in banks]
    for timed in range(ROUNDS + 1):
        for engine, measured in zip(engines, times, strict=True):
            for ids in chosen:
                begin = time.perf_counter()
                with engine.bank.use([NAME]) as view:
                    engine.logits_at(view, [ids], [NAME], torch.tensor([[0, len(ids) - 1]])).argmax().item()
                if timed:
                    measured.append(time.perf_counter() - begin)
    return [statistics.median(measured) for measured in times]


def bank_of(model: Any, prompt: Tensor | Path, *, compiled: bool = True) -> PromptBank:
    """A bank with one prompt: vectors [P, D], or an adapter folder.

    Args:
        compiled: whether its keys and values are kept between requests.
    """
    options: dict[str, Any] = {} if compiled else {"budget": 0}
    bank = PromptBank(model, **options)
    bank.add(NAME, prompt)
    return bank
