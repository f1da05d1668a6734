"""Compares a packed batch with each of its rows run alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds

if TYPE_CHECKING:
    from .runner import PackedRunner

# Largest difference between the two ways, relative to the largest logit, that rounding explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
GRADIENT_SHARE = 0.2
"""Weight of the prompts' gradients in that difference: a backward pass rounds several times as much."""
SLACK = 2.0
"""Times that tolerance for deep prompts, which are refused where plain ones only run slower: in bfloat16 sound batches
differ by up to 0.11 (SmolLM2-135M), ones with wrong positions or a lost virtual token by 0.23 and more."""
CHECKED_ROWS = 8
"""Rows of the first batches that are compared at most, spread over the batch."""


def tolerance(model: Any, slack: float = 1.0) -> float:
    """The largest relative difference that rounding explains in the precision a model computes in."""
    weight = model.get_input_embeddings().weight
    device = weight.device.type
    rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if getattr(model, "is_loaded_in_8bit", False):  # its products round to 8 bits and run in half precision
        rounded = torch.bfloat16
    return TOLERANCE[rounded] * slack


def compare_with_rows_alone(
    shared: PackedRunner,
    bank: FastSoftPrompt,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_ids: PromptIds,
) -> float:
    """The largest difference between rows run packed and each run alone: of their logits in the middle and at the end,
    relative to the largest logit, and, where a gradient is recorded, of the prompts' gradients (and of those of their
    token updates), relative to theirs."""
    rows = input_ids.shape[0]
    some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long().tolist()
    chosen = bank.choose(prompt_ids, rows)
    names = bank.indices(prompt_ids, rows)
    ids = names[some] if isinstance(names, Tensor) else [names[row] for row in some]
    mask = None if attention_mask is None else attention_mask[some]
    batch = shared.pack(bank, input_ids[some], mask, ids, None)

    parameters = [*chosen.tensors, *(factor for update in chosen.updates if update is not None for factor in update)]
    trained = [tensor for tensor in parameters if tensor.requires_grad] if torch.is_grad_enabled() else []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        trained = []  # a sharded model's backward needs every rank, whose rows may use fewer prompts
    theirs = [torch.zeros_like(tensor) for tensor in trained]
    alone, read = [], []
    for i, row in enumerate(some):
        real = batch.token_slots[i] >= 0
        slots = batch.token_slots[i][real]
        if not len(slots):
            continue
        prompt = update = None
        if chosen.ids[row] >= 0:
            prompt, update = chosen.tensors[chosen.ids[row]], chosen.updates[chosen.ids[row]]
        places = torch.tensor([len(slots) // 2, len(slots) - 1], device=slots.device)
        text = input_ids[row][real]
        logits = shared.logits_alone(prompt, text, places, gradient=bool(trained), update=update).double()
        if logits.requires_grad:  # at once, so that one row's graph is held at a time
            for total, grad in zip(theirs, _gradients(logits, trained), strict=True):
                total += grad
        alone.append(logits.detach())
        read.append(slots[places])
    if not alone:
        return 0.0
    expected = torch.cat(alone)
    got = shared.run(batch, torch.cat(read), {})[1].double()
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if trained and got.requires_grad:
        for mine, other in zip(_gradients(got, trained), theirs, strict=True):
            apart = ((mine - other).norm() / other.norm().clamp(min=1e-30)).item()
            difference = max(difference, GRADIENT_SHARE * apart)
    return difference


def _gradients(logits: Tensor, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum of squares of the logits; zeros for a prompt that does not reach them."""
    if not prompts:
        return []
    found = torch.autograd.grad(logits.square().sum(), list(prompts), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(prompts, found, strict=True)]
