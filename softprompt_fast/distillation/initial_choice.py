"""The choice among the kinds of initial values, of one prompt or of several that are trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from rich.console import Console
from torch import Tensor

from ..base.errors import Unsupported
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from .fitting import fitted_values
from .initial_values import values_from_text
from .settings import FITTED, INITS, DistillationSettings
from .teacher import Target
from .training import batch_loss, batches

COMPARED_BATCHES = 2
"""Batches on which kinds of initial values are compared."""
FITTED_ROWS = 128
"""Most training queries to which values are fitted. They run as one batch, without a gradient."""


@torch.no_grad()
def add_prompts(
    student: SoftPromptModel,
    texts: Mapping[str, Sequence[int]],
    count: int,
    targets: Sequence[Target],
    own: Mapping[str, Sequence[Target]],
    settings: DistillationSettings,
    console: Console,
) -> tuple[str, dict[str, float]]:
    """Adds prompts with the kind of initial values that has the lowest loss.

    Args:
        texts: token ids [T] of the text of each prompt, by the prompt's name.
        count: positions of each prompt.
        targets: to train on.
        own: by its name, the targets of a prompt that stands alone in front of a query.

    Returns:
        The kind, and each kind's loss; no losses if `init` names the kind.
    """
    some = list(islice(batches(targets, settings), COMPARED_BATCHES))
    compared = {id(target) for batch in some for target in batch}
    # Values are not fitted to the batches that compare kinds, unless there are no others.
    rows = {name: [target for target in alone if id(target) not in compared] or alone for name, alone in own.items()}
    values = _values(student, texts, count, rows, settings)
    kinds = list(values)
    for name, init in values[kinds[0]].items():
        student.add_prompt(name, init=init)
    if len(kinds) == 1:
        return kinds[0], {}
    losses, shown = {}, ", ".join(texts)
    for kind in kinds:
        _fill(student, values[kind])
        each = [batch_loss(student, next(iter(texts)), batch, settings.temperature).item() for batch in some]
        losses[kind] = sum(each) / len(each)
    best = min(kinds, key=lambda kind: losses[kind])
    _fill(student, values[best])
    told = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
    console.print(f"{shown}: loss of initial values: {told}; {best} is used", highlight=False)
    return best, losses


def _fill(student: SoftPromptModel, values: Mapping[str, Tensor]) -> None:
    for name, init in values.items():
        student.prompts[name].copy_(init)


def _values(
    student: SoftPromptModel,
    texts: Mapping[str, Sequence[int]],
    count: int,
    targets: Mapping[str, Sequence[Target]],
    settings: DistillationSettings,
) -> dict[str, dict[str, Tensor]]:
    """Of each kind that `init` allows, the values of each prompt."""
    auto = settings.init == "auto"
    kinds = [kind for kind in INITS if kind != FITTED] if auto else [str(settings.init)]
    if auto and settings.keep_first:
        kinds.remove("pooled")
    values = {
        kind: {name: values_from_text(student, ids, count, kind) for name, ids in texts.items()}
        for kind in kinds
        if kind != FITTED
    }
    if isinstance(student, DeepPromptModel) and (auto or FITTED in kinds):
        rows = {
            name: [target.query + target.continuation for target in some[:FITTED_ROWS]]
            for name, some in targets.items()
        }
        if missing := [name for name, some in rows.items() if not some]:
            if not auto:
                raise ValueError(f"`init` fitted needs queries about each text, got none about {missing[0]!r}")
            return values
        try:
            values[FITTED] = {
                name: fitted_values(student, ids, count, rows[name], keep_first=settings.keep_first)
                for name, ids in texts.items()
            }
        except Unsupported:  # a model for which `init` names this kind was checked before
            if not auto:
                raise
    return values
