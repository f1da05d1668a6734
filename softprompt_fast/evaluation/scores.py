"""Scores of rows, their summaries, their order and their wording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts.run_files import MAIN_SCORES
from .intervals import mean_interval, perplexity, wilson_interval


@dataclass
class RowScores:
    """One prompt's scores on rows, in their order."""

    losses: Tensor
    """[rows] negative log-probability: of the right label among the labels, or of the whole response."""
    weights: Tensor
    """[rows] weight of each row in the mean: 1, or the number of tokens of its response."""
    predicted: Tensor | None
    """[rows] place of the likeliest label among the task's; None: a generation task."""
    correct: Tensor | None
    """[rows] boolean; None: a generation task."""

    @classmethod
    def of_labels(cls, log_probabilities: Tensor, truth: Tensor) -> RowScores:
        """Scores of a classification.

        Args:
            log_probabilities: [rows, C] among the labels.
            truth: [rows], place of each row's label among the task's.
        """
        predicted = log_probabilities.argmax(-1)
        losses = -log_probabilities.gather(-1, truth[:, None])[:, 0]
        return cls(losses, torch.ones(len(truth), dtype=torch.float64), predicted, predicted == truth)

    @property
    def loss(self) -> float:
        """The mean over rows, or over the tokens of all responses."""
        return (self.losses.sum() / self.weights.sum()).item()

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct.double().mean().item()

    def summary(self) -> dict[str, float]:
        """Loss, accuracy or perplexity, and 95 % intervals (Wilson's for accuracy; none for the loss of one row)."""
        values = {"loss": self.loss, "rows": len(self.losses)}
        if len(self.losses) > 1:
            values["loss_low"], values["loss_high"] = mean_interval(self.losses, self.weights)
        return values | self._accuracy_or_perplexity()

    def metrics(self, truth: Tensor | None) -> dict[str, float]:
        """The scores that ``evaluate`` reports.

        Args:
            truth: [rows], place of each row's label; None for a generation task.
        """
        values = self._accuracy_or_perplexity()
        if truth is None or self.predicted is None:
            return {"loss": self.loss, **values, "rows": len(self.losses)}
        from sklearn.metrics import f1_score

        macro_f1 = float(f1_score(truth.tolist(), self.predicted.tolist(), average="macro"))
        return {**values, "macro_f1": macro_f1, "loss": self.loss, "rows": len(self.losses)}

    def _accuracy_or_perplexity(self) -> dict[str, float]:
        if self.correct is None:
            return {"perplexity": perplexity(self.loss)}
        hits = int(self.correct.sum())
        low, high = wilson_interval(hits, len(self.losses))
        return {"accuracy": hits / len(self.losses), "accuracy_low": low, "accuracy_high": high}


def main_score(scores: Mapping[str, float]) -> str | None:
    """The name of the score that counts beside the loss; None: there is only the loss."""
    return next((name for name in MAIN_SCORES if name in scores), None)


def rank(scores: dict[str, float], by: str) -> tuple[float, ...]:
    """A key that sorts scores, larger is better: by the main score ("accuracy") and then loss, or by "loss" alone."""
    name = main_score(scores)
    if by == "accuracy" and name is not None:
        return (scores[name], -scores["loss"])
    return (-scores["loss"],)


def describe_scores(scores: dict[str, float]) -> str:
    """Scores in words."""
    name = main_score(scores)
    if name is None:
        return f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f} ({scores['rows']:.0f} rows)"
    rows = f"{scores['rows']:.0f} rows"
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    interval = rows if low is None else f"95 % interval {low:.3f} to {high:.3f}, {rows}"
    others = [other for other in ("f1", "accuracy") if other in scores and other != name]
    more = "".join(f", {other} {scores[other]:.3f}" for other in others)
    return f"{name.replace('_', ' ')} {scores[name]:.3f} ({interval}){more}"
