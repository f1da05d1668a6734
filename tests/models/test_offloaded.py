"""Bases whose weights are not in place: offloaded by accelerate, embedded in 8 bits, or partitioned by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_models import IDS
from support.rows_alone import PROMPTS, ROWS, alone, relative
from support.tiny_models import batch, build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank

CPU = torch.device("cpu")


def parts(embedding: str) -> dict[str, str]:
    """A device map with a layer on disk."""
    rest = ("model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.2")
    return {"model.embed_tokens": embedding, "model.layers.1": "disk"} | dict.fromkeys(rest, "cpu")


def dispatched(model: Any, folder: Path, embedding: str) -> Any:
    import accelerate

    options: dict[str, Any] = {"main_device": "cpu", "offload_dir": folder, "force_hooks": True}
    return accelerate.dispatch_model(model, parts(embedding), **options)


def offloaded(model: Any, folder: Path, where: str) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if where == "disk":
        return accelerate.disk_offload(model, folder, execution_device=CPU)
    return dispatched(model, folder, where.partition("-")[2])


def with_prompts(model: Any, **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(model, **options)
    torch.manual_seed(3)
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32) * 0.5)
    return tuned


@pytest.mark.parametrize("execution", ["shared", "padded"])
@pytest.mark.parametrize("where", ["cpu", "disk", "dispatched-cpu", "dispatched-disk"])
def test_an_offloaded_base_gives_what_it_gives_in_place(where: str, execution: str, tmp_path: Path) -> None:
    tuned = with_prompts(offloaded(build("llama"), tmp_path, where), execution=execution)
    whole = with_prompts(build("llama"))
    meta = {p.device.type for p in tuned.base_model.parameters()}
    assert "meta" in meta
    assert (tuned.get_input_embeddings().weight.device.type == "meta") is (where != "dispatched-cpu")
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    outputs = [model(ids, mask, labels=labels, prompt_ids=ROWS, return_logits=True) for model in (tuned, whole)]
    assert tuned.execution_report().execution == execution
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    for output in outputs:
        output.loss.backward()
    for name in PROMPTS:
        assert relative(tuned.prompts[name].grad, whole.prompts[name].grad) < 1e-5
    options: dict[str, Any] = {"prompt_ids": ROWS, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(tuned.generate(ids, mask, **options), whole.generate(ids, mask, **options))
    assert (tuned.device, tuned.prompts["long"].device) == (CPU, CPU)


@pytest.mark.parametrize("name", ["t5", "bart-scaled", "gemma3", "gpt2"])
def test_other_offloaded_architectures(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    models = [build(name), accelerate.cpu_offload(build(name), execution_device=CPU)]
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for model in models:
        tuned = with_prompts(model)
        losses.append(tuned(ids, mask, labels=labels, prompt_ids=ROWS).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_initial_values_from_an_offloaded_vocabulary(tmp_path: Path) -> None:
    tuned, whole = spf.SoftPromptModel(offloaded(build("llama"), tmp_path, "cpu")), spf.SoftPromptModel(build("llama"))
    for model in (tuned, whole):
        model.add_prompt("drawn", 4, init="vocabulary", seed=0)
    assert torch.equal(tuned.prompts["drawn"], whole.prompts["drawn"])


def test_a_bank_over_an_offloaded_base(tmp_path: Path) -> None:
    bank, whole = (
        PromptBank(with_prompts(model)) for model in (offloaded(build("llama"), tmp_path, "disk"), build("llama"))
    )
    with bank.use(["long"]) as view, whole.use(["long"]) as expected:
        assert view.compiled is not None and expected.compiled is not None
        assert relative(view.compiled[:, :, :7], expected.compiled[:, :, :7]) < 1e-5
    bank.model(IDS, prompt_ids=["long"] * 4, prompts=view.prompts)  # brings weights, and takes them away again
    with bank.use(["long"]):
        assert (bank.hits, bank.misses) == (1, 1)
    with pytest.raises(ValueError, match=r"`model` must hold its weights to save .*, but they are offloaded"):
        bank.save_compiled(tmp_path / "compiled")


def test_files_of_an_offloaded_base(tmp_path: Path) -> None:
    with_prompts(offloaded(build("llama"), tmp_path / "weights", "disk")).save_pretrained(tmp_path / "prompts")
    assert len(spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path / "prompts").prompts) == len(PROMPTS)


def test_weights_that_nobody_brings_are_refused() -> None:
    with torch.device("meta"):
        model = type(build("llama"))(build("llama").config)
    tuned = spf.SoftPromptModel(model)
    with pytest.raises(TypeError, match="`embedding` must be on a real device, got a weight on 'meta'"):
        tuned.add_prompt("p", 3)


def test_an_embedding_in_8_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build("llama")
    embedding = bitsandbytes.nn.Embedding8bit(*model.model.embed_tokens.weight.shape)
    embedding.load_state_dict(model.model.embed_tokens.state_dict())
    model.model.embed_tokens = embedding.to("cpu")
    tuned = with_prompts(model)
    ids, mask = batch()
    with torch.no_grad():
        logits = tuned(ids, mask, prompt_ids=ROWS).logits
        assert embedding.weight.dtype == torch.int8
        for row, prompt in enumerate(ROWS):
            real = mask[row].bool()
            output, used = alone(tuned, ids[row][real], prompt)
            assert relative(logits[row][real], output.logits[0, len(used) :]) < 1e-5


# --- DeepSpeed ZeRO-3 ---


def partition(model: Any) -> None:
    """Makes parameters look as DeepSpeed ZeRO-3 leaves them: empty, with their shape in an attribute."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("kind", [spf.SoftPromptModel, spf.DeepPromptModel])
def test_a_partitioned_base_is_refused(kind: Callable[[Any], Any]) -> None:
    model = build("llama")
    partition(model)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM cannot use a prompt: DeepSpeed ZeRO-3 .* Use ZeRO-2"):
        kind(model)


@pytest.mark.parametrize("call", ["forward", "generate", "next_token_logits"])
def test_a_base_that_is_partitioned_later_is_refused(call: str) -> None:
    tuned = with_prompts(build("llama"))
    partition(tuned)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM cannot use a prompt: DeepSpeed ZeRO-3 .* Use ZeRO-2"):
        getattr(tuned, call)(torch.tensor([[4, 5]]), prompt_ids="long")
