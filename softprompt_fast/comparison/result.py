"""A comparison's result: its setup, one line per method, and the verdict."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..tasks.task import Task
from .splits import SPLITS
from .summary import COST_COLUMNS, SCORE_COLUMNS, MethodSummary
from .verdict import RULES

COLUMNS = (
    *("data", "model", "method", "status", "metric"),
    *SCORE_COLUMNS,
    "seeds",
    *(f"{split}_rows" for split in SPLITS),
    *COST_COLUMNS,
    "reason",
)
"""Columns of results.csv."""


@dataclass
class ComparisonSetup:
    """The facts that all methods share, in the order of results.json."""

    data: str
    """Name of the data in tables."""
    model: str
    metric: str
    """accuracy, or loss per token."""
    rows: dict[str, int]
    """Rows of each split."""
    left_out: dict[str, int]
    """Rows that were not used, by reason."""
    labels: dict[str, dict[str, int]]
    """Rows of each label in each split."""
    seeds: list[int]
    steps: int
    batch_size: int
    task: Task
    dtype: str = "auto"
    jobs_at_once: int = 1
    threads: int | None = None
    """Per process. None: torch's own choice."""
    model_facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and hardware of the first job with a result."""
    same_environment: bool = True
    """Whether all results come from that environment."""
    files: dict[str, str | None] | None = None
    """File of each split. None in it: a part of the data. Given by the caller, like ``split_seed``."""
    split_seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        optional = ("files", "split_seed")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


@dataclass
class Comparison:
    """The result of :func:`compare`, which ``folder`` holds as files."""

    folder: Path
    setup: ComparisonSetup
    summaries: list[MethodSummary]
    results: list[dict[str, Any]]
    """The result of every job, as in ``runs/``."""
    verdict: str

    def __getitem__(self, method: str) -> MethodSummary:
        for summary in self.summaries:
            if summary.method == method:
                return summary
        raise KeyError(f"{method!r} is not among the methods compared: {[s.method for s in self.summaries]}")

    @property
    def scored(self) -> list[MethodSummary]:
        """The methods that have a score."""
        return [summary for summary in self.summaries if summary.score is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions of single rows, which ``runs/`` holds."""
        jobs = [{key: value for key, value in result.items() if key != "rows"} for result in self.results]
        return {
            **self.setup.to_json(),
            "verdict": self.verdict,
            "rules": list(RULES),
            "methods": [summary.to_json() for summary in self.summaries],
            "jobs": jobs,
        }

    def to_csv(self) -> str:
        """One line per method; tables of several comparisons can be joined as they are."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        shared = {"data": self.setup.data, "model": self.setup.model, "metric": self.setup.metric}
        shared |= {f"{split}_rows": str(count) for split, count in self.setup.rows.items()}
        for summary in self.summaries:
            own = {name: value for name, value in summary.to_json().items() if name in COLUMNS}
            own |= {"seeds": " ".join(map(str, summary.seeds)), "reason": "; ".join(summary.reasons)}
            writer.writerow(shared | own)
        return stream.getvalue()
