"""The divergence of a student from its teacher, on the teacher's most probable tokens and the rest as one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tasks.encoding import IGNORED
from ..tuning.objective import AnswerLoss


def class_log_probabilities(logits: Tensor, top_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[M, K + 1] float32: log-probabilities of the tokens `top_ids` [M, K], and of all other tokens together.

    The rest is summed over its own logits, not subtracted from 1, so that it keeps its precision and its gradient.

    Args:
        logits: [M, V]; V must be larger than K. Differentiable once.
    """
    values: Tensor = _ClassLogProbabilities.apply(logits.float() / temperature if temperature != 1 else logits, top_ids)
    return values


class _ClassLogProbabilities(torch.autograd.Function):
    """With z the logits, L those of all tokens together and R those of the rest: z - L, and R - L.

    Its gradient is written at once. That of the plain expression makes several tensors of the logits' size, which is a
    sixth of a training step of SmolLM2-135M on two CPU cores.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_ids: Tensor) -> Tensor:
        top = logits.gather(-1, top_ids).float()
        others = logits.float().scatter(-1, top_ids, -torch.inf)
        rest = others.logsumexp(-1, keepdim=True)
        values = torch.cat([top, rest], -1)
        values -= values.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(others, rest, values, top_ids)
        ctx.dtype = logits.dtype
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        others, rest, values, top_ids = ctx.saved_tensors
        classes = gradient - gradient.sum(-1, keepdim=True) * values.exp()
        # All of the rest may be impossible.
        logits = (others - rest.masked_fill(rest == -torch.inf, 0.0)).exp_().mul_(classes[:, -1:])
        return logits.scatter_(-1, top_ids, classes[:, :-1]).to(ctx.dtype), None


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
        kept = targets != IGNORED
        logits = logits if bool(kept.all()) else logits[kept]
        student = class_log_probabilities(logits, self.top_ids.to(logits.device), self.temperature)
        teacher = self.log_probabilities.to(logits.device)
        divergence = kl_divergence(student, teacher) if self.reverse else kl_divergence(teacher, student)
        return divergence.sum() * self.temperature**2
