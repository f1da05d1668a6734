"""The result of a search: candidates, their scores in each rung, the recommendation, the report on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base.files import write_atomically
from ..evaluation.scores import RowScores, rank
from .budget import SearchPlan
from .significance import ALPHA, Difference, compare_scores

REPORT_FILE = "search.json"
FIGURE_FILE = "search.svg"


@dataclass
class RungResult:
    """A candidate after a rung."""

    rung: int
    """The rung's number, from 1."""
    steps: int
    total_steps: int
    scores: dict[str, float]
    """Scores on the rung's held-out rows, which choose the candidates: a little too good for the chosen ones."""
    training_seconds: float
    scoring_seconds: float
    seconds: float
    """Time of the whole rung, set-up and files included."""
    against_best: dict[str, Any] | None = None
    """The difference to the rung's best candidate; None: this is the best."""


@dataclass
class Candidate:
    """A length and a learning rate: one of Optuna's trials."""

    number: int
    num_virtual_tokens: int
    learning_rate: float
    rungs: list[RungResult] = field(default_factory=list)
    rows: RowScores | None = field(default=None, repr=False)
    """Row scores of its last rung; not part of the JSON."""

    @property
    def last(self) -> RungResult:
        return self.rungs[-1]

    def describe(self, *, with_rate: bool = True) -> str:
        """Such as "5 tokens at learning rate 0.03"."""
        count = f"{self.num_virtual_tokens} token{'s' if self.num_virtual_tokens > 1 else ''}"
        return f"{count} at learning rate {self.learning_rate:.2g}" if with_rate else count

    def to_json(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in ("number", "num_virtual_tokens", "learning_rate")}
        return values | {"rungs": [asdict(rung) for rung in self.rungs]}


@dataclass
class SearchResult:
    """The result of a search."""

    folder: Path
    """The recommended prompt's own folder."""
    plan: SearchPlan
    before: dict[str, float]
    """Held-out scores of the model without a prompt."""
    candidates: list[Candidate]
    """Ordered by length, then learning rate."""
    best: Candidate
    """The best candidate of the last rung."""
    recommended: Candidate
    """The shortest candidate of the last rung that is not significantly worse than the best."""
    comparison: Difference | None
    """The recommended candidate compared with the best; None: they are the same."""
    best_by: str
    """The score that ranks candidates: "loss", or "accuracy" and then loss."""
    test: dict[str, dict[str, float]]
    """Scores of ``recommended`` and ``best`` on rows that chose nothing; empty without such rows."""
    steps: int
    """Optimiser steps of all candidates together."""
    seconds: float
    """Time of the whole search, without interruptions and without the scores on test rows."""
    full_run_seconds: float
    """Estimate for one full run of the recommended length, from the steps and evaluations of this search."""
    rows_per_step: int
    """Training rows of each candidate's steps."""

    @property
    def metric(self) -> str:
        return "accuracy" if "accuracy" in self.before else "loss"

    def options(self) -> str:
        """The recommended settings as options of ``softprompt-fast train``."""
        chosen = self.recommended
        return (
            f"--virtual-tokens {chosen.num_virtual_tokens} --learning-rate {chosen.learning_rate:g} "
            f"--steps {self.plan.full_steps}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "recommended": self.recommended.number,
            "best": self.best.number,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "alpha": ALPHA,
            "options": self.options(),
            "metric": self.metric,
            "best_by": self.best_by,
            "before": self.before,
            "test": self.test,
            "steps": self.steps,
            "seconds": self.seconds,
            "full_run_seconds": self.full_run_seconds,
            "plan": asdict(self.plan),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    def write(self, folder: Path) -> Path:
        path = folder / REPORT_FILE
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        return path


def ranked(candidates: list[Candidate], by: str) -> list[Candidate]:
    """Ordered by the scores of their last rung, the best first; of equal ones, the shorter first."""
    return sorted(
        candidates,
        key=lambda c: (*(-value for value in rank(c.last.scores, by)), c.num_virtual_tokens, c.learning_rate),
    )


def judge(candidates: list[Candidate], by: str) -> tuple[Candidate, Candidate]:
    """The best of a rung, and the shortest that is not significantly worse; sets each one's ``against_best``."""
    order = ranked(candidates, by)
    best = order[0]
    assert best.rows is not None
    good = [best]
    for candidate in order[1:]:
        assert candidate.rows is not None
        difference = compare_scores(candidate.rows, best.rows, by)
        candidate.last.against_best = difference.to_json()
        if not difference.significantly_worse:
            good.append(candidate)
    return best, min(good, key=lambda c: c.num_virtual_tokens)  # of equally short ones, the first is the best


def promote(candidates: list[Candidate], keep: int, by: str) -> list[Candidate]:
    """The candidates that continue: the best by score, and always the shortest that is not significantly worse."""
    order = ranked(candidates, by)
    _, shortest = judge(candidates, by)
    chosen = order[:keep] if shortest in order[:keep] else [*order[: keep - 1], shortest]
    return sorted(chosen, key=candidates.index)
