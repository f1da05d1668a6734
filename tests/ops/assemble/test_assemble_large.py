"""More than 2^31 elements: where an index kept in 32 bits would wrap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import softprompt_fast as spf
from softprompt_fast.ops.extension import backend


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container if it allows less."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


ON_CPU = pytest.mark.skipif(available_memory() < 12e9, reason="needs 12 GB of free memory")
ON_GPU = pytest.mark.skipif(gpu_memory() < 12e9, reason="needs a GPU with 12 GB of free memory")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=[pytest.mark.cuda, ON_GPU])]
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("device", DEVICES)]


def test_vectors_and_gradients(native: backend.Ops, device: str) -> None:
    rows, tokens, length, dim, vocabulary = 8, 65_580, 20, 4096, 64
    input_ids = torch.randint(vocabulary, (rows, tokens), device=device)
    # Small whole numbers: their sums are exact in float32.
    embedding = torch.randint(-4, 5, (vocabulary, dim), device=device).bfloat16()
    prompts = torch.randint(-4, 5, (length, dim), device=device).bfloat16()
    batch = spf.assemble(input_ids, embedding, prompts, [0, length])
    vectors = batch.inputs_embeds.flatten(0, 1)
    assert vectors.numel() > 2**31
    width = tokens + length
    for slot in (0, length, width - 1, 2**31 // dim - 1, 2**31 // dim, (rows - 1) * width, rows * width - 1):
        row, place = divmod(slot, width)
        expected = prompts[place] if place < length else embedding[input_ids[row, place - length]]
        assert torch.equal(vectors[slot], expected), slot

    # The output as its own gradient saves memory, and its sums are known.
    offsets = torch.tensor([0, length], device=device)
    for_prompts = native.prompt_backward(batch.inputs_embeds, batch.prompt_slots, None, offsets, length, torch.bfloat16)
    assert torch.equal(for_prompts, prompts * rows)
    for_embedding = native.embedding_backward(
        batch.inputs_embeds, input_ids, batch.token_slots, vocabulary, -1, 1.0, torch.bfloat16
    )
    counts = torch.bincount(input_ids.flatten(), minlength=vocabulary)[:, None]
    assert torch.equal(for_embedding, (embedding.float() * counts).bfloat16())


def test_visibility(native: backend.Ops, device: str) -> None:
    tokens = 46_400
    ids, embedding, prompts = (torch.zeros(*shape, device=device) for shape in ((1, tokens), (1, 1), (2, 1)))
    batch = spf.assemble(ids.long(), embedding, prompts, [0, 2], mask_format="4d_bool")
    mask = batch.attention_mask[0, 0]
    assert mask.numel() > 2**31
    for query in (0, 1, 2**31 // (tokens + 2), tokens + 1):
        assert mask[query, : query + 1].all() and not mask[query, query + 1 :].any()
