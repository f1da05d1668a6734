"""Prompts computed from other parameters while they are trained: parametrizations of ``torch.nn.utils.parametrize``.

The bank computes such a prompt whenever it is read. :func:`fold` makes it an ordinary prompt again, which costs nothing
extra to save and serve::

    reparameterize(bank, "movies", ResidualMLP(bank.embedding_dim))
    ...                                                               # train bank.parameters()
    fold(bank, "movies")
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fast_soft_prompt import FastSoftPrompt
from .parameter_names import PARAMETER_PREFIX


class Offset(nn.Module):
    """``P = P0 + d`` with d trained: weight decay of d is decay towards the initial prompt P0 [P, D]."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.initial: Tensor
        self.register_buffer("initial", initial.detach().clone())

    def forward(self, offset: Tensor) -> Tensor:
        return self.initial + offset

    def right_inverse(self, prompt: Tensor) -> Tensor:
        return prompt - self.initial


class ResidualMLP(nn.Module):
    """``P = p + LayerNorm(up(relu(down(p))))``, shared by the vectors (Razdaibiedina et al. 2023, arXiv 2305.03937).

    The norm's scale starts at 0, not at 1 as in the paper, so the prompt starts at its initial values.

    Args:
        dim: D
        bottleneck: width between the two layers.
    """

    def __init__(self, dim: int, bottleneck: int = 128) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, prompt: Tensor) -> Tensor:
        update: Tensor = self.norm(self.up(F.relu(self.down(prompt))))
        return prompt + update


class LowRank(nn.Module):
    """``P = P0 + A B`` with A [P, r] and B [r, D]: fewer numbers are trained. B starts at 0."""

    def __init__(self, length: int, dim: int, rank: int) -> None:
        super().__init__()
        if not 0 < rank <= min(length, dim):
            raise ValueError(f"`rank` must be 1 to {min(length, dim)}, the smaller side of [P, D], got {rank}")
        self.a = nn.Parameter(torch.randn(length, rank, dtype=torch.float32) / math.sqrt(rank))
        self.b = nn.Parameter(torch.zeros(rank, dim, dtype=torch.float32))

    def forward(self, prompt: Tensor) -> Tensor:
        return prompt.detach() + self.a @ self.b


class NormBound(nn.Module):
    """Vectors longer than ``bound`` are scaled down to it."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"`norm_bound` must be positive, got {bound}")
        self.bound = bound

    def forward(self, prompt: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(prompt, dim=1, keepdim=True)
        return prompt * (self.bound / norms.clamp(min=self.bound))


class PromptDropout(nn.Module):
    """In training each number of a prompt is dropped with probability ``p`` and the others scaled by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"`prompt_dropout` must be at least 0 and below 1, got {p}")
        self.p = p

    def forward(self, prompt: Tensor) -> Tensor:
        return F.dropout(prompt, self.p, self.training)


class SharedPart(nn.Module):
    """Puts vectors that several prompts share in front of a prompt's own: [P, D] -> [S + P, D].

    Args:
        vectors: [S, D], one parameter for all prompts that hold it.
    """

    def __init__(self, vectors: nn.Parameter) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, prompt: Tensor) -> Tensor:
        return torch.cat([self.vectors, prompt])


def reparameterize(bank: FastSoftPrompt, name: str, form: nn.Module) -> None:
    """Computes a prompt by ``form``, after any form that it has already. Its name and its use stay the same."""
    parameter = bank[name]
    form = form.to(device=parameter.device, dtype=parameter.dtype)
    # A shared part changes the shape, which the check of `unsafe=False` forbids.
    parametrize.register_parametrization(bank, PARAMETER_PREFIX + name, form, unsafe=isinstance(form, SharedPart))
    if isinstance(form, LowRank):
        bank.forms(name).original.requires_grad_(False)


def fold(bank: FastSoftPrompt, name: str) -> nn.Parameter:
    """Turns a prompt into an ordinary parameter with its computed values, without dropout; returns the parameter."""
    forms = bank.forms(name)
    if forms is not None:
        trained = any(parameter.requires_grad for parameter in forms.parameters())
        bank.replace_parameter(name, nn.Parameter(bank.snapshot(name), requires_grad=trained))
    return bank[name]
