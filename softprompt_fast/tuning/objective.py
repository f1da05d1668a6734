"""The losses that tuning minimises, on the logits of the places where an answer is expected.

Those of label words and texts are called as ``loss(logits, targets, rows, num_items_in_batch)`` with logits [M, V],
targets [M] (-100: none) and rows [M], the row of the batch that each target belongs to; see
``SoftPromptModel.forward(loss_function=...)``. That of a head reads the model's output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks.encoding import IGNORED, label_words
from ..tasks.label_tree import LabelTree
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


class LabelWordsLoss(AnswerLoss):
    """Cross entropy at the branches of the label words' :class:`LabelTree`, for words of several tokens.

    The targets of a row are the tokens of its label's word, one after the other.

    Args:
        words: token ids of each label's word.
        label_smoothing: share of the target that is spread over all tokens of a branch, 0 to 1.
    """

    def __init__(self, words: Sequence[Sequence[int]], label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        branches = LabelTree(words).branches
        prefixes = sorted({tuple(word[:step]) for word in words for step in range(len(word))}, key=len)
        nodes = {prefix: node for node, prefix in enumerate(prefixes)}  # the empty one comes first
        tokens = list(dict.fromkeys(token for word in words for token in word))
        self.depth = max(map(len, words))
        self._ids = torch.tensor(tokens)
        # A last node without branches is for what follows a word.
        self._next = torch.tensor(
            [[nodes.get((*prefix, token), len(nodes)) for token in tokens] for prefix in prefixes]
            + [[len(nodes)] * len(tokens)]
        )
        self._allowed = torch.tensor(
            [[token in branches.get(prefix, ()) for token in tokens] for prefix in prefixes] + [[False] * len(tokens)]
        )

    def total(self, logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        if self._ids.device != logits.device:
            self._ids, self._next, self._allowed = (
                part.to(logits.device) for part in (self._ids, self._next, self._allowed)
            )
        places = (targets[:, None] == self._ids).to(torch.uint8).argmax(1)
        continues = (rows == rows.roll(1)) & (targets.roll(1) != IGNORED)
        continues[:1] = False
        nodes = torch.zeros_like(places)
        for _ in range(self.depth - 1):  # each pass is right for one more token of every row
            nodes = torch.where(continues, self._next[nodes, places].roll(1), 0)
        allowed = self._allowed[nodes]
        # Not minus infinity: where no token is allowed its gradient would be NaN, although nothing is counted there.
        among = logits[:, self._ids].float()
        log_probabilities = among.masked_fill(~allowed, torch.finfo(among.dtype).min).log_softmax(-1)
        losses = -log_probabilities.gather(1, places[:, None])[:, 0]
        spread = -log_probabilities.masked_fill(~allowed, 0.0).sum(1) / allowed.sum(1).clamp(min=1)
        losses = (1 - self.label_smoothing) * losses + self.label_smoothing * spread
        counted = (targets != IGNORED) & allowed.gather(1, places[:, None])[:, 0]
        return torch.where(counted, losses, 0.0).sum()


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

    The objective "labels" compares labels only: :class:`LabelLoss` for words of one token, else
    :class:`LabelWordsLoss`. Encoder-decoders with words of one token use :class:`VocabularyLoss`, as all others do.
    """
    words = label_words(task, tokenizer, encoder_decoder=encoder_decoder)
    if objective != "labels" or not words:
        return VocabularyLoss(label_smoothing)
    if any(len(word) > 1 for word in words):
        return LabelWordsLoss(words, label_smoothing)
    tokens = [word[0] for word in words]
    if encoder_decoder or len(set(tokens)) < len(tokens):
        return VocabularyLoss(label_smoothing)
    return LabelLoss(tokens, label_smoothing)


class HeadLoss:
    """Cross entropy of a head's outputs, called by transformers' Trainer; in float32.

    Args:
        label_smoothing: share of the target that is spread over all outputs, 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum over ``num_items_in_batch`` labels (of all accumulated batches); None: over the given ones.

        Args:
            output: of the model; its ``logits`` [B, C] or [B, T, C], or ``start_logits`` and ``end_logits`` [B, T].
            labels: [B, 1], [B, T], or [B, 2], first and last token of the answer. -100: none.
        """
        starts = output.get("start_logits")
        logits = output["logits"] if starts is None else torch.stack([starts, output["end_logits"]], 1)
        smoothing = self.label_smoothing
        if starts is not None and smoothing:  # padding has the smallest number; nothing is spread over it
            raise ValueError(f"`label_smoothing` must be 0 with question answering, got {smoothing}")
        total = F.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=smoothing,
            reduction="sum",
        )
        return total / ((labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
