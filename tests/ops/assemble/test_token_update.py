"""Token updates (DePT): exact in every execution, trainable, kept on disk, refused where they are not supported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.rows_alone import relative
from support.tiny_models import ENCODER_DECODERS, batch, build
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.prompts.peft_files import read_prompt
from softprompt_fast.prompts.selection import Selection
from softprompt_fast.prompts.vector_files import read_vectors

WIDTH = 32
ROWS = ["far", None, "near", "plain", "far", "near"]
NAMES = ("near", "far", "plain")
SHARED = ["llama", "mistral-window", "gemma2", "gemma3", "granite", "gpt2", "olmo2", "smollm3"]
PADDED = ["gptj", "bloom", "bert", "t5", "bart-scaled"]


def tuned_model(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> spf.SoftPromptModel:
    """Three prompts: updates of the first 4 tokens, of more than there are, and none."""
    tuned = spf.SoftPromptModel(build(name, dtype=dtype), **options)
    for prompt, length in (("near", 2), ("far", 5), ("plain", 3)):
        tuned.add_prompt(prompt, init=torch.randn(length, WIDTH) * 0.5)
    for prompt, reach, rank in (("near", 4, 2), ("far", 20, 3)):
        tuned.prompts.set_token_update(prompt, torch.randn(reach, rank), torch.randn(rank, WIDTH) * 0.3)
    return tuned


def padded_batch(padding: str) -> tuple[Tensor, Tensor]:
    ids, mask = batch(rows=len(ROWS), padding="mixed" if padding == "holes" else padding)
    if padding == "holes":
        mask = (torch.rand(mask.shape) < 0.7).long()
        mask[:, 3] = 1
    return ids, mask


def alone(tuned: spf.SoftPromptModel, ids: Tensor, name: str | None) -> Tensor:
    """[1, P + T, D]: one unpadded row, made of the model's own embeddings by torch.cat and a loop."""
    vectors = tuned.get_input_embeddings()(ids[None])[0]
    if name is None:
        return vectors[None]
    update = tuned.prompts.token_update(name)
    rows = list(vectors)
    if update is not None:
        product = update[0] @ update[1]
        rows = [row + product[place] if place < len(product) else row for place, row in enumerate(rows)]
    return torch.cat([tuned.prompts[name].to(vectors), torch.stack(rows).to(vectors)])[None]


# --- the numbers ---


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", SHARED + PADDED)
def test_logits_and_gradients_equal_each_row_alone(name: str, padding: str) -> None:
    tuned = tuned_model(name)
    ids, mask = padded_batch(padding)
    extra = {"decoder_input_ids": torch.randint(3, 90, (len(ids), 5))} if name in ENCODER_DECODERS else {}
    output = tuned(ids, mask, prompt_ids=ROWS, **extra)
    assert tuned.execution_report().execution == ("shared" if name in SHARED else "padded")
    got, expected = [], []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        joined = alone(tuned, ids[row][real], prompt)
        logits = tuned.base_model(inputs_embeds=joined, **{key: x[row : row + 1] for key, x in extra.items()}).logits[0]
        expected.append(logits if extra else logits[-int(real.sum()) :])
        got.append(output.logits[row] if extra else output.logits[row][real])
        assert relative(got[-1], expected[-1]) < 1e-5
    parameters = list(tuned.prompts.parameters())
    assert len(parameters) == 7
    weights = torch.randn(got[0].shape[-1])
    grads = [
        torch.autograd.grad(torch.cat(x).sin() @ weights, parameters, torch.ones(len(torch.cat(x))))
        for x in (got, expected)
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_an_update_changes_its_rows_and_no_others() -> None:
    tuned = tuned_model()
    ids, mask = batch(rows=len(ROWS))
    with_updates = tuned(ids, mask, prompt_ids=ROWS).logits
    bare = spf.SoftPromptModel(tuned.base_model)
    for name in NAMES:
        bare.add_prompt(name, init=tuned.prompts[name].detach())
    without = bare(ids, mask, prompt_ids=ROWS).logits
    for row, prompt in enumerate(ROWS):
        difference = relative(with_updates[row], without[row])
        assert difference > 1e-2 if prompt in ("near", "far") else difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_half_precision_models_round_once(name: str, dtype: torch.dtype) -> None:
    tuned = tuned_model(name, dtype)
    ids, mask = batch(rows=len(ROWS))
    scale = float(getattr(tuned.get_input_embeddings(), "embed_scale", torch.ones(())).to(dtype))
    made = tuned.prompts(ids, mask, embedding=tuned.get_input_embeddings(), prompt_ids=ROWS)
    a, b = tuned.prompts.token_update("far") or ()
    vectors = tuned.get_input_embeddings().weight[ids[0]].float() * scale + (a[: ids.shape[1]] @ b)
    assert torch.equal(made.inputs_embeds[0, 5:], vectors.to(dtype))
    tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
    assert tuned.execution_report().execution == "shared", tuned.execution_report()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuned.prompts.parameters())


@pytest.mark.parametrize("common", [2, 6])
def test_shared_text_is_folded_with_its_update(common: int) -> None:
    """Of 'near' with its 4 updated tokens, a part of the update or all of it."""
    tuned = tuned_model()
    plain = spf.SoftPromptModel(tuned.base_model, tuned.prompts, shared_text=None)
    ids, mask = batch(rows=len(ROWS), tokens=18, padding="left")
    for row in range(len(ROWS)):
        ids[row, int(mask[row].argmax()) :][:common] = torch.arange(5, 5 + common)
        ids[row, int(mask[row].argmax()) + common] = 40 + row
    outputs = [model(ids, mask, labels=ids, prompt_ids=ROWS, return_logits=True) for model in (tuned, plain)]
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    assert all(model.execution_report().execution == "shared" for model in (tuned, plain))
    packs = [m.runner.pack(m.prompts.select(ROWS, len(ids)), ids, mask, None).layout.slots for m in (tuned, plain)]
    assert packs[1] - packs[0] == 2 * common
    grads = [torch.autograd.grad(output.loss, list(tuned.prompts.parameters())) for output in outputs]
    assert all(relative(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def test_the_comparison_with_rows_alone_knows_the_update(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tuned_model(shared_text=None)
    ids, mask = batch(rows=len(ROWS))
    monkeypatch.setattr(Selection, "token_factors", lambda self: None)
    with caplog.at_level(logging.WARNING):
        tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().execution == "padded"
    assert "differ from row-by-row logits" in caplog.text


def test_generates_what_each_row_alone_generates() -> None:
    tuned = tuned_model()
    ids, mask = batch(rows=len(ROWS), padding="left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = tuned.generate(ids, mask, ROWS, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(ROWS):
        joined = alone(tuned, ids[row][mask[row].bool()], prompt)
        full = torch.ones(joined.shape[:2], dtype=torch.long)
        assert torch.equal(
            tokens[row], tuned.base_model.generate(inputs_embeds=joined, attention_mask=full, **options)[0]
        )


def test_ids_as_a_tensor_under_compile() -> None:
    bank = tuned_model().prompts
    embedding = torch.nn.Embedding(96, WIDTH)

    def loss(ids: Tensor, mask: Tensor, prompt_ids: Tensor) -> Tensor:
        return bank(ids, mask, embedding=embedding, prompt_ids=prompt_ids).inputs_embeds.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, tokens in ((4, 11), (5, 7)):
        arguments = (*batch(rows, tokens), torch.arange(rows) % 4 - 1)
        grads = [torch.autograd.grad(run(*arguments), list(bank.parameters())) for run in (compiled, loss)]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


# --- learning ---


def _tune(rank: int | None, steps: int = 120) -> list[float]:
    """Losses of a text of one word repeated, at each of whose places another word is to be said."""
    torch.manual_seed(0)
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("p", init=torch.randn(2, WIDTH) * 0.1)
    if rank is not None:
        tuned.prompts.add_token_update("p", 12, rank, seed=0)
    ids = torch.full((1, 12), 7)
    labels = torch.randint(3, 90, ids.shape)
    optimiser = torch.optim.Adam(tuned.prompts.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = tuned(ids, labels=labels, prompt_ids="p").loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_starts_as_no_change_and_learns_what_a_prompt_cannot() -> None:
    updated, bare = _tune(11), _tune(None)
    assert updated[0] == pytest.approx(bare[0], rel=1e-6)
    assert updated[-1] < 0.4 * bare[-1], (updated[-1], bare[-1])


# --- the bank ---


def test_adding_an_update() -> None:
    bank = spf.FastSoftPrompt(WIDTH, {"p": 3})
    a, b = bank.add_token_update("p", 16, 4, seed=1)
    assert a.shape == (16, 4) and b.shape == (4, WIDTH) and not b.any()
    assert 0.4 < a.abs().max() <= 0.5 and a.unique().numel() == a.numel()
    names = [name for name, _ in bank.named_parameters()]
    assert names == ["prompt_p", "update_a_p", "update_b_p"]
    other = spf.FastSoftPrompt(WIDTH, {"p": 3})
    assert torch.equal(other.add_token_update("p", 16, 4, seed=1)[0], a)
    assert not torch.equal(spf.FastSoftPrompt(WIDTH, {"p": 3}).add_token_update("p", 16, 4, seed=2)[0], a)
    assert "token_updates=['p']" in repr(bank)


def test_rename_freeze_and_remove_take_the_update_along() -> None:
    bank = tuned_model().prompts
    a, b = bank.token_update("near") or (None, None)
    bank.rename_prompt("near", "close")
    assert bank.token_update("close") == (a, b)
    bank.freeze_prompt("close")
    assert {name for name, p in bank.named_parameters() if not p.requires_grad} == {
        "prompt_close",
        "update_a_close",
        "update_b_close",
    }
    bank.freeze_prompt("close", False)
    assert all(p.requires_grad for p in bank.parameters())
    bank.remove_prompt("close")
    assert {name for name, _ in bank.named_parameters()} == {
        "prompt_far",
        "update_a_far",
        "update_b_far",
        "prompt_plain",
    }
    bank.add_prompt("close", init=torch.randn(2, WIDTH))
    assert bank.token_update("close") is None


def test_state_dict_round_trip() -> None:
    bank = tuned_model().prompts
    for start in ({}, {"far": 5}, {"plain": 1, "near": 9}):
        other = spf.FastSoftPrompt(WIDTH, start)
        if "near" in start:
            other.add_token_update("near", 3, 1)
        other.load_state_dict(bank.state_dict())
        assert other.lengths.items() == bank.lengths.items()
        ids, mask = batch(rows=len(ROWS))
        made = [
            each(ids, mask, embedding=torch.ones(96, WIDTH), prompt_ids=ROWS).inputs_embeds for each in (bank, other)
        ]
        assert torch.equal(*made)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("other", 4, 2), KeyError, "no prompt 'other'"),
        (("plain", 0, 2), ValueError, "`max_length` must be a positive integer, got 0"),
        (("plain", 4, 1.5), ValueError, "`rank` must be a positive integer, got 1.5"),
        (("near", 4, 2), ValueError, "prompt 'near' already has a token update"),
    ],
)
def test_bad_updates_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    bank = tuned_model().prompts
    with pytest.raises(error, match=message):
        bank.add_token_update(*arguments)
    assert len(list(bank.parameters())) == 7


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(4, 2), torch.ones(3, WIDTH), r"\[U, r\] and \[r, 32\], got \[4, 2\] and \[3, 32\]"),
        (torch.ones(4, 2), torch.ones(2, 8), r"got \[4, 2\] and \[2, 8\]"),
        (torch.full((4, 2), float("nan")), torch.ones(2, WIDTH), "must be finite"),
    ],
)
def test_bad_factors_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned_model().prompts.set_token_update("plain", a, b)


# --- where it is not supported ---


def test_banks_of_compiled_prompts_refuse_an_update(tmp_path: Path) -> None:
    tuned = tuned_model()
    with pytest.raises(ValueError, match="prompt 'near' has a token update, which PromptBank cannot use"):
        PromptBank(tuned)
    tuned.save_pretrained(tmp_path)
    bank = PromptBank(tuned.base_model)
    with pytest.raises(ValueError, match="the prompt has a token update, which only"):
        bank.add_directory(tmp_path / "near")
    assert bank.add_directory(tmp_path / "plain") == ["plain"]


def test_deep_prompts_refuse_an_update() -> None:
    deep = spf.DeepPromptModel(build("llama"))
    deep.add_prompt("p", init=torch.randn(2, WIDTH))
    deep.prompts.add_token_update("p", 4, 2)
    ids, mask = batch()
    for call in (deep, deep.generate):
        with pytest.raises(ValueError, match="a token update, which deep prompts cannot use"):
            call(ids, mask, prompt_ids="p")


# --- files ---


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    again = spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path)
    ids, mask = batch(rows=len(ROWS))
    assert torch.equal(again(ids, mask, prompt_ids=ROWS).logits, tuned(ids, mask, prompt_ids=ROWS).logits)
    assert again.prompts.token_update("plain") is None
    assert all(p.requires_grad for p in again.prompts.parameters()) and len(list(again.prompts.parameters())) == 7
    again.load_prompt(tmp_path / "near", "copy")
    assert torch.equal(again.prompts.token_update("copy")[1], tuned.prompts.token_update("near")[1])
    stored = load_file(tmp_path / "near" / "adapter_model.safetensors")
    assert {key: list(value.shape) for key, value in stored.items()} == {
        "prompt_embeddings": [2, WIDTH],
        "token_update_a": [4, 2],
        "token_update_b": [2, WIDTH],
    }
    config = json.loads((tmp_path / "near" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SOFTPROMPT_FAST_DEPT"
    assert (config["token_update_length"], config["token_update_rank"]) == (4, 2)
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_peft_refuses_a_prompt_with_an_update(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="SOFTPROMPT_FAST_DEPT"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path / "near")
    peft.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")


def test_no_reader_of_prompts_drops_an_update(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    folder = tmp_path / "near"
    for read in (read_prompt, read_vectors, tuned.read_prompt, lambda path: tuned.add_prompt("x", init=path)):
        with pytest.raises(ValueError, match="has a token update"):
            read(folder)
    with pytest.raises(ValueError, match="prompt 'near' has a token update, which `init` cannot use"):
        tuned.add_prompt("x", init="near")
    with pytest.raises(ValueError, match="must hold a prompt alone, got a prompt with a token update"):
        read_vectors(folder / "adapter_model.safetensors")
    assert "x" not in tuned.prompts


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_update_length", 5, r"must have shapes \[5, 2\] and \[2, 32\], got \[4, 2\] and \[2, 32\]"),
        ("token_update_rank", None, r"got \[4, 2\]"),
        ("num_virtual_tokens", 3, r"num_virtual_tokens=3 rows, got \[2, 32\]"),
        ("peft_type", "PROMPT_TUNING", "must hold a prompt alone"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path, names=["near"])
    path = tmp_path / "near" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path)


def test_a_model_of_another_width_refuses_the_file(tmp_path: Path) -> None:
    tuned_model().save_pretrained(tmp_path, names=["near"])
    other = spf.SoftPromptModel(build("llama"), execution="padded")
    other.prompts = spf.FastSoftPrompt(16)
    with pytest.raises(ValueError, match="hidden size 16, got 32"):
        other.load_prompt(tmp_path / "near")
    assert not len(other.prompts)
