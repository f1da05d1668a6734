"""Successive halving (Jamieson and Talwalkar 2016) within a budget: how many candidates, steps and rows a rung has.

The first rung gets two shares, every other one: after few steps prompts mostly differ in how far they got, and a long
one that only began to learn can score below a short one that changed little. What scoring the last rung on all rows
costs is laid aside first. Both limits, steps and estimated cost, hold whichever candidates go on: the plan takes the
costliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_STEPS = 4
"""Fewer are mostly warm-up and tell nothing."""
LEAST_ROWS = 20
REDUCTION = 3
"""A rung keeps a third."""
FIRST_SHARES = 2
"""Shares of the first of several rungs."""
LAST = 2
"""Candidates of the last rung."""
EVALUATIONS = 5
"""Of an ordinary run, beside the one without a prompt."""
RESERVE = 0.05
"""Share of the budget laid aside for set-up, files and clocks that vary, so that measured time keeps to it too."""
SCORING_SHARE = 0.25
"""Most of an earlier rung's share that scoring may take; rows are left out to keep to it."""


@dataclass(frozen=True)
class Costs:
    """Estimated costs, in tokens through the model once; a training step runs them forward and backward."""

    text_per_step: float
    """Text tokens of a step: rows times mean length."""
    prompts_per_step: float
    """Times that the prompt runs in a step: once per batch, with every row where execution is not shared."""
    text_per_row: float
    """Text tokens that scoring a held-out row runs."""
    prompts_per_row: float
    rows: int
    """Held-out rows."""

    def step(self, length: int) -> float:
        return 2 * (self.text_per_step + self.prompts_per_step * length)

    def scoring(self, length: int, rows: int) -> float:
        return rows * (self.text_per_row + self.prompts_per_row * length)

    def full_run(self, steps: int, length: int) -> float:
        """``tune`` with its usual evaluations."""
        evaluations = EVALUATIONS * self.scoring(length, self.rows) + self.scoring(0, self.rows)
        return steps * self.step(length) + evaluations


@dataclass(frozen=True)
class Rung:
    """A round of the search, all of whose candidates are trained and scored alike."""

    candidates: int
    steps: int
    """Of each candidate in this rung."""
    total_steps: int
    """Of each candidate up to its end."""
    rows: int
    """Held-out rows that score it."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search will do at most."""

    rungs: list[Rung]
    full_steps: int
    """F, of one full run."""
    most_steps: int
    """Of all candidates together."""
    cost: float
    """Estimate, in full runs."""
    budget: float
    """In full runs: the limit of ``cost``, and of ``most_steps`` / F."""


@dataclass
class Budget:
    """Hands out steps rung by rung.

    Args:
        lengths: of all candidates; a length stands once per candidate.
        full_steps: F.
        full_length: the length of the full run that ``budget`` counts in.
    """

    costs: Costs
    lengths: Sequence[int]
    full_steps: int
    full_length: int
    budget: float
    sizes: list[int] = field(init=False)
    cost_spent: float = field(init=False)
    steps_spent: int = field(init=False, default=0)
    level: int = field(init=False, default=0)
    _rung: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"`lengths` must be one or more positive integers, got {list(self.lengths)}")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise ValueError(f"`budget` must be a positive number of full runs, got {self.budget}")
        self.sizes = rung_sizes(len(self.lengths), self.budget)
        self.cost_spent = self.costs.scoring(0, self.costs.rows)  # without a prompt, once

    @property
    def cost_limit(self) -> float:
        return (1 - RESERVE) * self.budget * self.costs.full_run(self.full_steps, self.full_length)

    @property
    def steps_limit(self) -> int:
        return math.floor((1 - RESERVE) * self.budget * self.full_steps)

    def next_rung(self, lengths: Sequence[int]) -> Rung:
        """The next rung for candidates of these lengths, which are counted as trained.

        Raises:
            ValueError: the budget leaves too few steps.
        """
        left, costs = len(self.sizes) - self._rung, self.costs
        last = left == 1
        own = FIRST_SHARES if self._rung == 0 else 1
        part = own / (own + left - 1)  # of what is left
        rows, share = costs.rows, self.cost_limit - self.cost_spent
        if not last:
            finalists = sorted(self.lengths)[-self.sizes[-1] :]
            share = (share - sum(costs.scoring(length, costs.rows) for length in finalists)) * part
            per_row = sum(costs.scoring(length, 1) for length in lengths)
            rows = min(rows, max(LEAST_ROWS, math.floor(SCORING_SHARE * share / per_row)))
        scoring = sum(costs.scoring(length, rows) for length in lengths)
        per_step = sum(costs.step(length) for length in lengths)
        steps = min(
            math.floor((share - scoring) / per_step),
            math.floor((self.steps_limit - self.steps_spent) * part) // len(lengths),
            self.full_steps - self.level,
        )
        if steps < min(LEAST_STEPS, self.full_steps - self.level):
            raise ValueError(
                f"`budget` of {self.budget:g} full runs of {self.full_steps} steps leaves {max(0, steps)} steps for "
                f"each of {len(lengths)} candidates, and {LEAST_STEPS} are the least that tell anything; "
                "give fewer lengths or learning rates, fewer held-out rows, more steps, or a larger budget"
            )
        self._rung += 1
        self.level += steps
        self.steps_spent += steps * len(lengths)
        self.cost_spent += steps * per_step + scoring
        return Rung(len(lengths), steps, self.level, rows)


def rung_sizes(candidates: int, budget: float) -> list[int]:
    """Candidates of each rung: a third goes on, until those left can be trained fully, two at least."""
    sizes = [candidates]
    while sizes[-1] > max(LAST, math.floor(budget)):
        sizes.append(max(LAST, math.ceil(sizes[-1] / REDUCTION)))
    return sizes


def make_plan(costs: Costs, lengths: Sequence[int], full_steps: int, full_length: int, budget: float) -> SearchPlan:
    """The plan if the costliest candidates always went on.

    Raises:
        ValueError: the budget leaves too few steps.
    """
    money = Budget(costs, lengths, full_steps, full_length, budget)
    rungs = [money.next_rung(sorted(lengths)[-size:]) for size in money.sizes]
    full = costs.full_run(full_steps, full_length)
    return SearchPlan(rungs, full_steps, money.steps_spent, money.cost_spent / full, budget)
