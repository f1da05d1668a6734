"""Row-by-row scores by any backend."""

from __future__ import annotations

from typing import Any

import torch

from ..evaluation.scoring import RowScores
from ..tasks.collation import length_order
from ..tasks.examples import Examples
from .backends import Backend
from .encoding import Encoder


@torch.no_grad()
def score_rows(backend: Backend, encoder: Encoder, rows: Examples, batch_size: int) -> RowScores:
    """Scores of labelled rows, in their order; classification compares the label words' log-probabilities."""
    task = encoder.task
    texts, targets = encoder.texts(rows), encoder.targets(rows)
    losses = torch.zeros(len(rows), dtype=torch.float64)
    if task.kind == "generation":
        weights = torch.tensor([float(len(target)) for target in targets], dtype=torch.float64)
        for indices in length_order([len(x) + len(y) for x, y in zip(texts, targets, strict=True)], batch_size):
            chosen = [texts[i] for i in indices]
            losses[indices] = -log_likelihoods(backend, chosen, [targets[i] for i in indices])
        return RowScores(losses, weights, None, None)
    words = encoder.words()
    places = torch.tensor([task.labels.index(str(row[task.target_column])) for row in rows])
    predicted = torch.zeros(len(rows), dtype=torch.int64)
    for indices in length_order([len(text) for text in texts], batch_size):
        chosen = [texts[i] for i in indices]
        if all(len(word) == 1 for word in words):
            logits = backend.next_logits(chosen)[:, [word[0] for word in words]].double().cpu()
        else:
            logits = torch.stack([log_likelihoods(backend, chosen, [word] * len(chosen)) for word in words], 1)
        scores = logits.log_softmax(-1)
        predicted[indices] = scores.argmax(-1)
        losses[indices] = -scores.gather(-1, places[indices][:, None])[:, 0]
    return RowScores(losses, torch.ones(len(rows), dtype=torch.float64), predicted, predicted == places)


def log_likelihoods(backend: Backend, texts: list[list[int]], targets: list[list[int]]) -> Any:
    """[B], summed over each target's tokens; on the host in float64."""
    tokens = torch.tensor([token for target in targets for token in target])
    rows = torch.tensor([row for row, target in enumerate(targets) for _ in target])
    logits = backend.target_logits(texts, targets)
    chosen = logits.float().log_softmax(-1).gather(-1, tokens.to(logits.device)[:, None])[:, 0]
    return torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, chosen.double().cpu())
