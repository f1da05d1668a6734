"""On a pretended GPU. :mod:`test_never_waits` runs this file in a process of its own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import tensors
from support.pretended_gpu import OnGpu, Waits, pretended_gpu, to_gpu
from support.rows_alone import ROWS, tuned_model
from support.tiny_models import batch
from torch import Tensor

from softprompt_fast.ops.segment_attention import varlen
from softprompt_fast.packed.attention import masked_attention

MODELS = ["llama", "mistral-window", "gpt2", "gemma3", "qwen3"]


def any_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """The shape and the gradients of a library's attention; it reads nothing on the host."""
    return query + key.mean() + value.mean()


@pytest.mark.parametrize("attention", ["padded rows", "a library"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_training_step_never_waits(name: str, attention: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    facts = {"lengths": mask.sum(1).tolist(), "num_targets": int(mask.sum())}
    expected = tuned(ids, mask, labels=labels, prompt_ids=ROWS, **facts).loss  # and the comparison of the first batch
    to_gpu(tuned)
    given = {"input_ids": OnGpu(ids), "attention_mask": OnGpu(mask), "labels": OnGpu(labels), "prompt_ids": ROWS}
    with pretended_gpu(may_wait=True):
        loss = tuned(**given, **facts).loss
        torch.testing.assert_close(loss.held, expected)
    libraries = ["any"] if attention == "a library" else []
    with (
        pretended_gpu(),
        mock.patch.dict(varlen.LIBRARIES, {"any": any_attention}),
        mock.patch.object(varlen, "libraries", lambda *tensors: libraries),
    ):
        tuned(**given, **facts).loss.backward()
    assert tuned.execution_report().execution == "shared"
    assert all(isinstance(tuned.prompts[prompt].grad, OnGpu) for prompt in ("short", "long"))


def test_a_step_that_must_count_is_noticed() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    tuned(ids, mask, labels=ids, prompt_ids=ROWS)
    to_gpu(tuned)
    with pretended_gpu(), pytest.raises(Waits, match="tolist"):
        tuned(OnGpu(ids), OnGpu(mask), labels=OnGpu(ids), prompt_ids=ROWS)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: int(x[0]),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x),
        lambda x: x.unique(),
        lambda x: [0] * x.max(),
    ],
)
def test_reading_a_value_of_the_gpu_is_noticed(read: Any) -> None:
    with pretended_gpu(), pytest.raises(Waits):
        read(OnGpu(torch.arange(3)))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_on_a_gpu_a_mask_meets_as_many_heads_of_keys_as_of_queries(key_heads: int, queries: int) -> None:
    """Else PyTorch keeps all scores in memory."""
    calls: list[tuple[int, int, bool]] = []
    attention = F.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[1], key.shape[1], options["enable_gqa"]))
        return attention(query, key, value, **options)

    given = tensors(key_heads, queries)
    with pretended_gpu(), mock.patch.object(F, "scaled_dot_product_attention", recorded):
        found = masked_attention(*(OnGpu(x) for x in given), 0.3)
    assert isinstance(found, OnGpu)
    torch.testing.assert_close(found.held, masked_attention(*given, 0.3))
    ((query_heads, heads_of_keys, grouped),) = calls
    assert query_heads == heads_of_keys and not grouped
