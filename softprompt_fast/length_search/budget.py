"""Successive halving (Jamieson and Talwalkar 2016) within a budget: the candidates, steps and rows of each rung.

The first rung gets two shares of the budget, each other rung gets one. After few steps prompts mostly differ in how far
they got: a long prompt that only began to learn can score below a short one that changed little. The cost of scoring
the last rung on all rows is reserved first. Both limits, steps and estimated cost, hold whichever candidates continue,
because the plan assumes the most expensive ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_STEPS = 4
"""Fewer steps are mostly warm-up and show nothing."""
LEAST_ROWS = 20
"""Held-out rows that score a candidate, at least."""
REDUCTION = 3
"""A rung keeps a third of its candidates."""
FIRST_SHARES = 2
"""Shares of the budget for the first of several rungs."""
LAST = 2
"""Candidates of the last of several rungs."""
EVALUATIONS = 5
"""Evaluations of an ordinary run, in addition to the one without a prompt."""
RESERVE = 0.05
"""Share of the budget reserved for set-up, files and varying clocks, so that measured time keeps to it too."""
SCORING_SHARE = 0.25
"""Largest part of an earlier rung's share that scoring may take; rows are left out to keep to it."""


@dataclass(frozen=True)
class Costs:
    """Estimated costs. The unit is one token through the model once; a training step runs it forward and backward."""

    text_per_step: float
    """Text tokens in a step: rows times mean length."""
    prompts_per_step: float
    """How often the prompt runs in a step: once per batch, or with every row if execution is not shared."""
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
    """A round of the search. All its candidates are trained and scored in the same way."""

    candidates: int
    steps: int
    """Steps of each candidate in this rung."""
    total_steps: int
    """Steps of each candidate in this rung and the earlier ones."""
    rows: int
    """Held-out rows that score each candidate."""


@dataclass(frozen=True)
class SearchPlan:
    """The most that a search will do."""

    rungs: list[Rung]
    full_steps: int
    """F, the steps of one full run."""
    most_steps: int
    """Steps of all candidates together."""
    cost: float
    """Estimated cost, in full runs."""
    budget: float
    """The limit of ``cost`` and of ``most_steps`` / F, in full runs."""


@dataclass
class Budget:
    """Hands out steps rung by rung.

    Args:
        lengths: the length of each candidate.
        full_steps: F.
        full_length: the prompt length of the full run that ``budget`` is counted in.
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
        part = own / (own + left - 1)  # this rung's part of the remaining budget
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
                f"each of {len(lengths)} candidates, but a candidate needs at least {LEAST_STEPS}; "
                "give fewer lengths or learning rates, fewer held-out rows, more steps, or a larger budget"
            )
        self._rung += 1
        self.level += steps
        self.steps_spent += steps * len(lengths)
        self.cost_spent += steps * per_step + scoring
        return Rung(len(lengths), steps, self.level, rows)


def rung_sizes(candidates: int, budget: float) -> list[int]:
    """Candidates of each rung: a third continues, at least two, until the budget can train the remaining in full."""
    sizes = [candidates]
    while sizes[-1] > max(LAST, math.floor(budget)):
        sizes.append(max(LAST, math.ceil(sizes[-1] / REDUCTION)))
    return sizes


def make_plan(costs: Costs, lengths: Sequence[int], full_steps: int, full_length: int, budget: float) -> SearchPlan:
    """The plan if the most expensive candidates always continued.

    Raises:
        ValueError: the budget leaves too few steps.
    """
    allowance = Budget(costs, lengths, full_steps, full_length, budget)
    rungs = [allowance.next_rung(sorted(lengths)[-size:]) for size in allowance.sizes]
    full = costs.full_run(full_steps, full_length)
    return SearchPlan(rungs, full_steps, allowance.steps_spent, allowance.cost_spent / full, budget)
