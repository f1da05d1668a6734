"""Scores of a batch of units: log-probabilities of targets, and of choices for the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluation.likelihood import Ids, log_probabilities
from ..tasks.collation import padded
from ..tasks.label_tree import LabelTree, Prefix
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
    targets = [unit.target for unit in units]
    with engine.bank.use(names) as view:
        logits = ViewBackend(engine, view, names).target_logits([unit.ids for unit in units], targets)
    rows: list[int] = []
    at = 0
    for unit, target in zip(units, targets, strict=True):
        if unit.choices is None:
            rows += range(at, at + len(target))
        else:
            rows += [at + step for step, choices in unit.choices for _ in choices]
        at += len(target)
    tokens = [
        unit.target if unit.choices is None else [token for _, choices in unit.choices for token in choices]
        for unit in units
    ]
    values = log_probabilities(logits, rows, [token for each in tokens for token in each])
    return [part.tolist() for part in values.split([len(each) for each in tokens])]


def label_units(tree: LabelTree, row: int, member: int, name: str | None, ids: list[int]) -> list[Unit]:
    """Units that compare labels after a text: one for each path of the tree.

    Args:
        member: of the first unit.
    """
    units = []
    for i, path in enumerate(tree.paths):
        choices = [(len(prefix), tree.branches[prefix]) for prefix in tree.branches_on(path)]
        units.append(Unit(row, member + i, name, ids, [*path, choices[-1][1][0]], choices))
    return units


def label_scores(tree: LabelTree, results: Sequence[Sequence[float]]) -> list[list[float]]:
    """The log-probability of each label, up to a constant, for each prompt whose :func:`label_units` have run."""
    scores = []
    for at in range(0, len(results), len(tree.paths)):
        values: dict[Prefix, Tensor] = {}
        for path, result in zip(tree.paths, results[at : at + len(tree.paths)], strict=True):
            prefixes = tree.branches_on(path)
            parts = torch.tensor([result], dtype=torch.float64).split([len(tree.branches[p]) for p in prefixes], 1)
            values |= zip(prefixes, parts, strict=True)
        scores.append(tree.scores(values, 1)[0].tolist())
    return scores


@torch.no_grad()
def score_head(engine: Engine, units: Sequence[Unit]) -> list[list[float]]:
    """Per unit: the log-probability of each class, by a sequence-classification head."""
    names = [unit.prompt for unit in units]
    with engine.bank.use(names) as view:
        ids, mask = padded([unit.ids for unit in units], engine.model.device, side="left")
        logits = engine.model(ids, mask, None, names, prompts=view.prompts).logits
    values: list[list[float]] = logits.double().log_softmax(-1).tolist()
    return values
