"""Scores of a batch of units: log-probabilities of targets, and of choices for the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluation.likelihood import Ids, log_probabilities
from ..tasks.collation import padded
from .engine import Engine
from .prompt_bank import View
from .requests import Unit


class ViewBackend:
    """Logits of an engine for texts that each have a prompt of a bank's view."""

    def __init__(self, engine: Engine, view: View, names: Sequence[str | None]) -> None:
        self.engine, self.view, self.names = engine, view, names

    def next_logits(self, texts: Ids) -> Tensor:
        return self.target_logits(texts, [[0]] * len(texts))  # the first target token is predicted, not read

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        logits = self.engine.target_logits(self.view, texts, self.names, targets)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite")
        return logits


def score_units(engine: Engine, units: Sequence[Unit]) -> list[list[float]]:
    """Per unit: the log-probability of each of its choices, or of each token of its target."""
    names = [unit.prompt for unit in units]
    # All choices are read from the logits that predict the first of them.
    targets = [unit.target if unit.choices is None else unit.choices[:1] for unit in units]
    with engine.bank.use(names) as view:
        logits = ViewBackend(engine, view, names).target_logits([unit.ids for unit in units], targets)
    rows: list[int] = []
    at = 0
    for unit, target in zip(units, targets, strict=True):
        rows += range(at, at + len(target)) if unit.choices is None else [at] * len(unit.choices)
        at += len(target)
    tokens = [unit.target if unit.choices is None else unit.choices for unit in units]
    values = log_probabilities(logits, rows, [token for each in tokens for token in each])
    return [part.tolist() for part in values.split([len(each) for each in tokens])]


@torch.no_grad()
def score_head(engine: Engine, units: Sequence[Unit]) -> list[list[float]]:
    """Per unit: the log-probability of each class, by a sequence-classification head."""
    names = [unit.prompt for unit in units]
    with engine.bank.use(names) as view:
        ids, mask = padded([unit.ids for unit in units], engine.model.device, side="left")
        logits = engine.model(ids, mask, None, names, prompts=view.prompts).logits
    values: list[list[float]] = logits.double().log_softmax(-1).tolist()
    return values
