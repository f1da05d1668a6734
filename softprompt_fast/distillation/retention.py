"""How much of a text's effect is retained: measured on held-out queries, against the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..models.soft_prompt_model import SoftPromptModel
from .divergence import kl_divergence
from .settings import DistillationSettings
from .teacher import Target, Teacher, logits_of

NOTHING, CUT, POOLED, WHOLE = "nothing", "text cut", "mean-pooled", "whole text"


@dataclass(frozen=True)
class Contestant:
    """What is in front of the queries."""

    label: str
    tokens: int
    """Positions that it takes in the context."""
    model: SoftPromptModel
    prompt: str | tuple[str, ...] | None


@dataclass(frozen=True)
class Retention:
    """Agreement with the whole text on held-out queries."""

    label: str
    tokens: int
    agreement: float
    """Share of the places of the teacher's continuations at which the most probable token is the teacher's."""
    kl: float
    """Mean divergence of the next token's distribution from the teacher's, over the whole vocabulary, in nats."""
    first_token: float
    """Share of the queries whose answer begins with the teacher's most probable token."""
    rouge_l: float | None = None
    """Mean ROUGE-L F1 of what it says and what the teacher says, both continuing freely; None: not measured."""
    same_text: float | None = None
    """Share of the queries after which both say exactly the same; None: not measured."""
    scores: dict[str, float] = field(default_factory=dict)
    """The score of the caller's function by its name; none if it gave none."""


@torch.no_grad()
def measure_retention(
    teacher: Teacher,
    contestants: Sequence[Contestant],
    targets: Sequence[Target],
    settings: DistillationSettings,
) -> list[Retention]:
    """The retention of each contestant. The teacher's distributions are computed once for all of them."""
    sums = {id(one): [0.0, 0.0, 0.0] for one in contestants}
    places = sum(len(target.continuation) for target in targets)
    for batch in teacher.batches(targets, settings.batch_size):
        firsts = torch.tensor([0] + [len(target.continuation) for target in batch[:-1]]).cumsum(0)
        expected = teacher.logits(batch).float().log_softmax(-1)
        best = expected.argmax(-1)
        for one in contestants:
            got = logits_of(one.model, one.prompt, batch).float().log_softmax(-1)
            same = (got.argmax(-1) == best).double()
            values = (same.sum(), kl_divergence(expected, got).double().sum(), same[firsts.to(same.device)].sum())
            sums[id(one)] = [total + value.item() for total, value in zip(sums[id(one)], values, strict=True)]
    return [
        Retention(
            one.label,
            one.tokens,
            agreement=sums[id(one)][0] / places,
            kl=sums[id(one)][1] / places,
            first_token=sums[id(one)][2] / len(targets),
        )
        for one in contestants
    ]
