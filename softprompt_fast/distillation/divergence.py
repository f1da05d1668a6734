"""The divergence of a student from its teacher, on the teacher's most probable tokens and the rest as one class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks.encoding import IGNORED
from ..tuning.objective import AnswerLoss


def class_log_probabilities(logits: Tensor, top_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[M, K + 1] float32: log-probabilities of the tokens `top_ids` [M, K], and of all other tokens together.

    The rest is summed over its own logits, not subtracted from 1, so that it keeps its precision and its gradient.

    Args:
        logits: [M, V]; V must be larger than K.
    """
    logits = logits.float() / temperature
    norm = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, top_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, top_ids), others], -1) - norm


def kl_divergence(target: Tensor, other: Tensor) -> Tensor:
    """[M], KL(target || other) of log-probabilities [M, C]; classes without probability in `target` count 0."""
    p = target.exp()
    return torch.where(p > 0, p * (target - other), 0.0).sum(-1)


@dataclass(frozen=True)
class DistillationLoss(AnswerLoss):
    """Mean KL divergence of teacher and student per token, times the temperature squared.

    The square keeps the gradient's size for any temperature (Hinton et al. 2015, arXiv 1503.02531).
    """

    top_ids: Tensor
    """[M, K], for every target of the batch, row by row."""
    log_probabilities: Tensor
    """[M, K + 1], the teacher's."""
    temperature: float = 1.0
    reverse: bool = False
    """KL(student || teacher) instead of KL(teacher || student)."""

    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        logits = logits[targets != IGNORED]
        student = class_log_probabilities(logits, self.top_ids.to(logits.device), self.temperature)
        teacher = self.log_probabilities.to(logits.device)
        divergence = kl_divergence(student, teacher) if self.reverse else kl_divergence(teacher, student)
        return divergence.sum() * self.temperature**2
