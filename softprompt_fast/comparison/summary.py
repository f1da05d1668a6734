"""One line per method, from the results of its jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ..evaluation.intervals import wilson_interval
from ..evaluation.statistics import Array, bootstrap_interval, holm, mcnemar, paired_permutation
from .settings import DESCRIPTIONS, WITHOUT_SEED

REFERENCE = "prompt"

# Metadata of a summary's fields: the group of columns in results.csv, and whether the value is a mean over seeds.
SCORE = {"column": "score"}
COST = {"column": "cost"}
MEAN_COST = {"column": "cost", "mean": True}


@dataclass
class MethodSummary:
    """A method's scores over seeds and what it costs; costs are means over seeds."""

    method: str
    description: str
    status: str
    """ok, failed (no seed has a result), partly failed, not applicable."""
    reasons: list[str] = field(default_factory=list)
    """Why a seed has no result."""
    seeds: list[int] = field(default_factory=list)
    """The seeds that have a result."""
    scores: list[float] = field(default_factory=list)
    """Accuracy (classification) or loss per token (generation) of each seed."""
    score: float | None = field(default=None, metadata=SCORE)
    score_sd: float | None = field(default=None, metadata=SCORE)
    """Standard deviation over seeds; None with fewer than two."""
    score_low: float | None = field(default=None, metadata=SCORE)
    score_high: float | None = field(default=None, metadata=SCORE)
    interval: str | None = field(default=None, metadata=SCORE)
    """wilson: for one seed's accuracy; bootstrap: resampled rows, mean over seeds."""
    loss: float | None = field(default=None, metadata=SCORE)
    loss_low: float | None = field(default=None, metadata=SCORE)
    loss_high: float | None = field(default=None, metadata=SCORE)
    macro_f1: float | None = field(default=None, metadata=SCORE)
    difference: float | None = field(default=None, metadata=SCORE)
    """The score minus the prompt's, on the seeds that both have."""
    p: float | None = field(default=None, metadata=SCORE)
    p_holm: float | None = field(default=None, metadata=SCORE)
    test: str | None = field(default=None, metadata=SCORE)
    """mcnemar or permutation; both compare row by row."""
    trainable_parameters: float | None = field(default=None, metadata=MEAN_COST)
    stored_bytes: float | None = field(default=None, metadata=MEAN_COST)
    prefix_tokens: float | None = field(default=None, metadata=MEAN_COST)
    text_tokens: float | None = field(default=None, metadata=MEAN_COST)
    train_seconds: float | None = field(default=None, metadata=MEAN_COST)
    evaluation_seconds: float | None = field(default=None, metadata=MEAN_COST)
    inference_seconds_per_1000: float | None = field(default=None, metadata=COST)
    flops_per_row: float | None = field(default=None, metadata=MEAN_COST)
    flops_per_row_cached: float | None = field(default=None, metadata=MEAN_COST)
    memory_loaded: float | None = field(default=None, metadata=MEAN_COST)
    memory_training: float | None = field(default=None, metadata=MEAN_COST)
    memory_inference: float | None = field(default=None, metadata=MEAN_COST)
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SCORE_COLUMNS = tuple(f.name for f in fields(MethodSummary) if f.metadata.get("column") == "score")
COST_COLUMNS = tuple(f.name for f in fields(MethodSummary) if f.metadata.get("column") == "cost")
MEANS = tuple(f.name for f in fields(MethodSummary) if f.metadata.get("mean"))
"""Facts of a job's result whose mean over seeds is the summary's."""


def summarise(results: Sequence[dict[str, Any]], methods: Sequence[str], truth: Sequence[str]) -> list[MethodSummary]:
    """One summary per method, in the given order, compared with the soft prompt if that has a result.

    Args:
        results: of all jobs, as in their files.
        truth: [rows], the test rows' labels; not used for generation.
    """
    by_method = {m: [r for r in results if r["method"] == m] for m in methods}
    summaries = [_one(method, by_method[method], truth) for method in methods]
    _compare(summaries, by_method)
    return summaries


def _one(method: str, results: Sequence[dict[str, Any]], truth: Sequence[str]) -> MethodSummary:
    good = [r for r in results if r["status"] == "ok"]
    summary = MethodSummary(method, DESCRIPTIONS[method], "ok")
    summary.options = results[0]["options"] if results else {}
    summary.reasons = [f"seed {r['seed']}: {r['reason']}" for r in results if r["status"] != "ok"]
    if not good:
        other = [r for r in results if r["status"] == "not applicable"]
        summary.status = "not applicable" if other else "failed"
        if other:
            summary.reasons = [other[0]["reason"]]
        return summary
    if summary.reasons:
        summary.status = "partly failed"
    summary.seeds = [r["seed"] for r in good]
    rows = len(good[0]["rows"]["losses"])
    weights = np.array(good[0]["rows"]["weights"])
    losses = _mean_over_seeds(good, "losses")
    summary.loss = float(losses.sum() / weights.sum())
    summary.loss_low, summary.loss_high = bootstrap_interval(losses, weights)
    if good[0]["rows"]["correct"] is None:
        summary.scores = [float(np.sum(r["rows"]["losses"]) / weights.sum()) for r in good]
        summary.score_low, summary.score_high, summary.interval = summary.loss_low, summary.loss_high, "bootstrap"
    else:
        hits = [sum(r["rows"]["correct"]) for r in good]
        summary.scores = [hit / rows for hit in hits]
        mean = _mean_over_seeds(good, "correct")
        all_same = mean.min() == mean.max() and mean[0] in (0.0, 1.0)  # resampling gives the same rows each time
        if len(good) == 1 or all_same:
            summary.score_low, summary.score_high = wilson_interval(hits[0], rows)
            summary.interval = "wilson"
        else:
            summary.score_low, summary.score_high = bootstrap_interval(mean)
            summary.interval = "bootstrap"
        summary.macro_f1 = fmean(_macro_f1(truth, r["rows"]["predicted"]) for r in good)
    summary.score = fmean(summary.scores)
    if len(good) > 1:
        summary.score_sd = stdev(summary.scores)
    for name in MEANS:
        setattr(summary, name, fmean(r[name] for r in good))
    summary.inference_seconds_per_1000 = fmean(1000 * r["inference_seconds"] / rows for r in good)
    return summary


def _compare(summaries: Sequence[MethodSummary], by_method: dict[str, list[dict[str, Any]]]) -> None:
    """Fills in differences from the soft prompt and their p values."""
    reference = {r["seed"]: r for r in by_method.get(REFERENCE, []) if r["status"] == "ok"}
    if not reference:
        return
    tested = []
    for summary in summaries:
        if summary.score is None or summary.method == REFERENCE:
            continue
        own = {r["seed"]: r for r in by_method[summary.method] if r["status"] == "ok"}
        if summary.method in WITHOUT_SEED:
            pairs = [(next(iter(own.values())), other) for other in reference.values()]
        else:
            pairs = [(own[seed], reference[seed]) for seed in own if seed in reference]
        if not pairs:
            continue
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        if first[0]["rows"]["correct"] is None:
            weights = np.array(first[0]["rows"]["weights"])
            a, b = _mean_over_seeds(first, "losses"), _mean_over_seeds(second, "losses")
            summary.difference = float((a - b).sum() / weights.sum())
            summary.p, summary.test = paired_permutation(a, b), "permutation"
        else:
            a, b = _mean_over_seeds(first, "correct"), _mean_over_seeds(second, "correct")
            summary.difference = float((a - b).mean())
            if len(pairs) == 1:
                summary.p, summary.test = mcnemar(a, b), "mcnemar"
            else:
                summary.p, summary.test = paired_permutation(a, b), "permutation"
        tested.append(summary)
    for summary, corrected in zip(tested, holm([s.p or 0.0 for s in tested]), strict=True):
        summary.p_holm = corrected


def _mean_over_seeds(results: Sequence[dict[str, Any]], name: str) -> Array:
    """[rows], of each row's value."""
    mean: Array = np.array([r["rows"][name] for r in results], dtype=np.float64).mean(0)
    return mean


def _macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    from sklearn.metrics import f1_score

    score: Callable[..., Any] = f1_score
    return float(score(truth, predicted, average="macro", zero_division=0))
