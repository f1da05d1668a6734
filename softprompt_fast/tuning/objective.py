"""The losses that tuning minimises, on the logits of the places where an answer is expected.

Each is called as ``loss(logits, targets, rows, num_items_in_batch)`` with logits [M, V], targets [M] (-100: none) and
rows [M], the row of the batch that each target belongs to; see ``SoftPromptModel.forward(loss_function=...)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks.encoding import IGNORED, label_token_ids
from ..tasks.task import Task


class AnswerLoss(ABC):
    """Mean loss over the targets; in float32."""

    @abstractmethod
    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        """Sum over targets that are not -100."""

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The sum over ``num_items_in_batch`` targets (of all accumulated batches); None: over the given targets."""
        count = (targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return self.total(logits, targets, rows) / count


class VocabularyLoss(AnswerLoss):
    """Cross entropy over the whole vocabulary."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        return F.cross_entropy(
            logits.float(), targets, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="sum"
        )


class LabelLoss(AnswerLoss):
    """Cross entropy among the label words. Classification compares only these, so nothing else is learnt.

    Args:
        token_ids: [C], the token of each label's word.
        label_smoothing: share of the target that is spread over all labels, 0 to 1.
    """

    def __init__(self, token_ids: Sequence[int], label_smoothing: float = 0.0) -> None:
        self.token_ids = list(dict.fromkeys(token_ids))
        self.label_smoothing = label_smoothing
        self._ids: Tensor | None = None

    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        if self._ids is None or self._ids.device != logits.device:
            self._ids = torch.tensor(self.token_ids, device=logits.device)
        hits = targets[:, None] == self._ids
        places = torch.where(hits.any(1), hits.to(torch.uint8).argmax(1), IGNORED)
        return F.cross_entropy(
            logits[:, self._ids].float(),
            places,
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )


class MixedLoss(AnswerLoss):
    """Several tasks in one batch, each with its own loss.

    Args:
        losses: one per task.
        groups: [B], the task of each row of the batch.
    """

    def __init__(self, losses: Sequence[AnswerLoss], groups: Sequence[int]) -> None:
        self.losses = losses
        self.groups = groups

    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        group = torch.tensor(self.groups, device=logits.device)[rows]
        parts = []
        for i in sorted(set(self.groups)):  # a mask, because a selection would wait for the GPU
            parts.append(self.losses[i].total(logits, torch.where(group == i, targets, IGNORED), rows))
        return torch.stack(parts).sum()


def choose_loss(
    objective: str, task: Task, tokenizer: Any, *, label_smoothing: float = 0.0, encoder_decoder: bool = False
) -> AnswerLoss:
    """The loss of a task.

    The objective "labels" needs labels of one token each and a decoder; otherwise the loss is :class:`VocabularyLoss`.
    """
    words = label_token_ids(task, tokenizer)
    if objective == "labels" and words is not None and not encoder_decoder:
        return LabelLoss(words, label_smoothing)
    return VocabularyLoss(label_smoothing)
