"""A frozen base in 8 or 4 bits: the numbers of the padded layout, and a gradient for the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import LLAMA, batch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import softprompt_fast as spf

pytest.importorskip("bitsandbytes")
WIDTH = 128  # of rows of a weight: more than a block of 64 that is quantized together
ROWS = ["long", None, "short", "long"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_base(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**LLAMA | wide, initializer_range=0.1)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    results: list[Any] = []
    for execution in ("shared", "padded"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        assert "bitsandbytes" in type(model.model.layers[0].mlp.up_proj).__module__
        tuned = spf.SoftPromptModel(model, execution=execution)
        torch.manual_seed(0)
        for name, length in {"short": 2, "long": 7}.items():
            tuned.add_prompt(name, init=torch.randn(length, WIDTH) * 0.1)
        ids, mask = batch()
        loss = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS).loss
        loss.backward()
        assert tuned.execution_report().execution == execution, tuned.execution_report()
        results.append([loss.detach(), *(tuned.prompts[name].grad for name in ("short", "long"))])
    for shared, padded in zip(*results, strict=True):
        tolerance = 1e-4 if bits == 4 else 1e-2  # 8-bit products run in half precision here
        assert (shared - padded).norm() <= tolerance * padded.norm()
        assert padded.norm() > 0
