"""Similarity of prompts, computed from their vectors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def token_cosines(a: Tensor, b: Tensor) -> Tensor:
    """[P, D], [P', D] -> [P, P'], the cosine of every pair of vectors."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"prompts must be [P, D] with the same D, got {list(a.shape)} and {list(b.shape)}")
    return normalize(a.detach().cpu().double(), dim=1) @ normalize(b.detach().cpu().double(), dim=1).T


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the mean vectors: SPoT's first measure ("cosine similarity of average tokens")."""
    return cosine_similarity(a.detach().cpu().double().mean(0), b.detach().cpu().double().mean(0), dim=0).item()


def pairwise_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine over all pairs of vectors: SPoT's second measure ("per-token average cosine similarity")."""
    return token_cosines(a, b).mean().item()


def aligned_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the vectors at the same places, over as many as the shorter prompt has.

    It shows whether one prompt was tuned from the other. Between runs with different starts, places mean little.
    """
    return token_cosines(a, b).diagonal().mean().item()


def between_prompts(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[N, N] twice: :func:`mean_cosine` and :func:`aligned_cosine` of all pairs."""
    means = [[mean_cosine(a, b) for b in prompts] for a in prompts]
    aligned = [[aligned_cosine(a, b) for b in prompts] for a in prompts]
    return torch.tensor(means), torch.tensor(aligned)
