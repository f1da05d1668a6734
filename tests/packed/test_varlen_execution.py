"""Shared-prompt execution through variable-length attention, as on a GPU, for every decoder that runs packed."""

from __future__ import annotations

import pytest
import torch
from support.rows_alone import ROWS, alone, relative, tuned_model
from support.tiny_models import DECODERS, batch, changes_mask, own_attention
from support.varlen_stand_in import path_of_a_gpu

SHARED = [name for name in DECODERS if not own_attention(name) and not changes_mask(name)]


@pytest.mark.parametrize("name", SHARED)
def test_logits_and_gradients_equal_each_row_alone(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    with path_of_a_gpu() as calls:
        output = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    assert tuned.execution_report().execution == "shared"
    assert calls or tuned.config.attn_logit_softcapping  # no library has soft caps, which some versions compute
    output.logits.pow(2).sum().backward()
    total, parts = torch.zeros(()), []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, used = alone(tuned, ids[row][real], prompt)
        assert relative(output.logits[row][real], expected.logits[0, len(used) :]) < 1e-5
        total = total + expected.logits[0, len(used) :].pow(2).sum()
        parts.append((prompt, used))
    total.backward()
    for prompt in ("short", "long"):
        wanted = sum(used.grad for owner, used in parts if owner == prompt)
        got = tuned.prompts[prompt].grad
        assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5
