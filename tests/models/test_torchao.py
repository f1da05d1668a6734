"""A base that torchao has quantised: each row's own numbers, a gradient for the prompt, and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows_alone import ROWS, alone, relative
from support.tiny_models import LLAMA, batch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank
from softprompt_fast.prompts.base_identity import base_fingerprint, same_base

pytest.importorskip("torchao")
ao = pytest.importorskip("torchao.quantization")
WIDTH = 128
PROMPTS = {"short": 2, "long": 7}
FORMATS: dict[str, Callable[[], Any]] = {
    "int8": lambda: ao.Int8WeightOnlyConfig(),
    "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    "float8": lambda: ao.Float8WeightOnlyConfig(),
}


def base_model() -> Any:
    torch.manual_seed(0)
    wide = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 32, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**LLAMA | wide)).eval()


def quantized(kind: str, what: type = torch.nn.Linear, dtype: torch.dtype = torch.float32) -> Any:
    model = base_model().to(dtype)
    ao.quantize_(model, FORMATS[kind](), filter_fn=lambda module, name: isinstance(module, what))
    module = model.model.layers[0].mlp.up_proj if what is torch.nn.Linear else model.model.embed_tokens
    assert "torchao" in type(module.weight).__module__
    return model


def with_prompts(model: Any, **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(model, **options)
    torch.manual_seed(0)
    for name, length in PROMPTS.items():
        tuned.add_prompt(name, init=torch.randn(length, WIDTH) * 0.1)
    return tuned


def check_rows(tuned: spf.SoftPromptModel, tolerance: float = 1e-5) -> None:
    """Numbers and the prompts' gradients of a mixed batch are those of each row alone."""
    torch.manual_seed(1)
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    weights = torch.randn_like(logits)
    parameters = [tuned.prompts[name] for name in PROMPTS]
    got = torch.autograd.grad((logits * weights * mask[..., None]).sum(), parameters)
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        output, used = alone(tuned, ids[row][real], prompt)
        values = output.logits[0, len(used) :]
        assert relative(logits[row][real], values) < tolerance
        if prompt is not None:
            (gradient,) = torch.autograd.grad((values * weights[row][real]).sum(), used)
            expected[list(PROMPTS).index(prompt)] += gradient
    for a, b in zip(got, expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() < 5 * tolerance * b.norm()


@pytest.mark.parametrize("what", [torch.nn.Linear, torch.nn.Embedding])
@pytest.mark.parametrize("execution", ["shared", "padded"])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_those_alone(kind: str, execution: str, what: type) -> None:
    tuned = with_prompts(quantized(kind, what), execution=execution)
    check_rows(tuned)
    assert tuned.execution_report().execution == execution


@pytest.mark.parametrize("kind", FORMATS)
def test_half_precision(kind: str) -> None:
    tuned = with_prompts(quantized(kind, dtype=torch.bfloat16))
    check_rows(tuned, 4e-2)
    assert tuned.execution_report().execution == "shared"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prompt_is_trained_and_continues_text(kind: str, tmp_path: Path) -> None:
    tuned = with_prompts(quantized(kind)).train()
    ids, mask = batch()
    optimizer = torch.optim.AdamW(tuned.prompts.parameters(), lr=3e-2)
    losses = []
    for _ in range(5):
        loss = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    tuned.eval().save_pretrained(tmp_path)
    rows = ids[:1].repeat(2, 1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        tokens = tuned.generate(rows, prompt_ids=["short", "long"], **options)
        for row, prompt in enumerate(PROMPTS):
            text = rows[row]
            for _ in range(5):
                text = torch.cat([text, alone(tuned, text, prompt)[0].logits[0, -1:].argmax(-1)])
            assert torch.equal(tokens[row], text)
    loaded = spf.SoftPromptModel.from_pretrained(quantized(kind), tmp_path)
    assert torch.equal(loaded.prompts["long"], tuned.prompts["long"])
    whole = base_model()
    spf.SoftPromptModel.from_pretrained(whole, tmp_path)  # the base before it was quantised is the same
    assert same_base(base_fingerprint(tuned.base_model), base_fingerprint(whole))


def test_a_model_that_transformers_quantises(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    config = TorchAoConfig(FORMATS["int8"]())
    options: dict[str, Any] = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    tuned = with_prompts(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).eval())
    check_rows(tuned)
    bank = PromptBank(tuned)
    bank.save_compiled(tmp_path)
    assert sorted(bank.load_compiled(tmp_path)) == sorted(PROMPTS)
    with pytest.raises(ValueError, match="was compiled with other weights"):
        PromptBank(quantized("int4")).load_compiled(tmp_path)


def test_adapters_over_a_quantised_base() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = with_prompts(peft.get_peft_model(quantized("int8"), config).eval(), train_adapters=True)
    check_rows(tuned)
    assert any("lora_" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)


def test_formats_without_a_gradient_infer_and_refuse_to_train() -> None:
    model = base_model()
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    tuned = with_prompts(model)
    ids, mask = batch()
    with torch.no_grad():
        logits = tuned(ids, mask, prompt_ids=ROWS).logits
        for row, prompt in enumerate(ROWS):
            real = mask[row].bool()
            output, used = alone(tuned, ids[row][real], prompt)
            assert relative(logits[row][real], output.logits[0, len(used) :]) < 5e-2  # activations have 8 bits
    tuned.train()
    with pytest.raises(TypeError, match="LlamaForCausalLM cannot train prompts: its layers pass no gradient on"):
        tuned(ids, mask, labels=ids, prompt_ids=ROWS)
    tuned(ids, mask, labels=ids, prompt_ids=[None] * 4)  # nothing is to be trained


@pytest.mark.filterwarnings("ignore")
def test_scales_of_a_whole_batch_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(base_model(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match="cannot use prompts in batches: a row beside a longer one differs"):
        spf.SoftPromptModel(model)
