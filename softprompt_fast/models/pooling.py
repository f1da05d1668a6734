"""One vector for each text, from the hidden states of its tokens."""

from __future__ import annotations

from torch import Tensor

from ..base.errors import either

POOLINGS = ("mean", "first", "last")


def pooled_text(states: Tensor, attention_mask: Tensor | None = None, how: str = "mean") -> Tensor:
    """[B, D], one vector for each row's text: for search, clustering and similarity.

    Args:
        states: [B, T, D], such as the ``last_hidden_state`` of :class:`SoftPromptModel`. It has no columns of prompts,
            so only tokens of the text are read.
        attention_mask: [B, T] of 1 and 0; None: no padding.
        how: "mean" of the tokens, "first" token or "last" token. A row without tokens is zero.

    Raises:
        ValueError: another `how`, or shapes that do not fit.
    """
    if how not in POOLINGS:
        raise ValueError(f"`how` must be {either(POOLINGS)}, got {how!r}")
    if states.dim() != 3:
        raise ValueError(f"`states` must have shape [B, T, D], got {list(states.shape)}")
    real = states.new_ones(states.shape[:2]) if attention_mask is None else (attention_mask != 0).to(states.dtype)
    if real.shape != states.shape[:2]:
        raise ValueError(f"`attention_mask` must have shape {list(states.shape[:2])}, got {list(real.shape)}")
    if how != "mean":
        counted = real.cumsum(1) if how == "first" else real.flip(1).cumsum(1).flip(1)
        real = real * (counted == 1)
    total = (states.masked_fill(real[..., None] == 0, 0) * real[..., None]).sum(1)
    pooled: Tensor = total / real.sum(1, keepdim=True).clamp(min=1)
    return pooled
