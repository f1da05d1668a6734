"""One object never changes what another object on the same base model returns, and the base is given back as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows_alone import ROWS, alone, relative, tuned_model
from support.tiny_models import batch, build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank


def add_prompts(tuned: spf.SoftPromptModel) -> spf.SoftPromptModel:
    for seed, (name, length) in enumerate({"short": 2, "long": 7}.items()):
        tuned.add_prompt(name, length, init="vocabulary", seed=seed)
    return tuned


def is_right(tuned: spf.SoftPromptModel) -> bool:
    """Whether every row equals the row alone."""
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, used = alone(tuned, ids[row][real], prompt)
        if relative(logits[row][real], expected.logits[0, len(used) :]) > 1e-5:
            return False
    return True


def bank_is_right(bank: PromptBank) -> bool:
    """Whether a text after a compiled prompt gets the logits of the row alone."""
    from softprompt_fast.inference.engine import Engine

    text = torch.randint(3, 90, (6,))
    with bank.use(["long"]) as view:
        logits = Engine(bank).logits_at(view, [text.tolist()], ["long"], torch.tensor([[0, 5]]))
    vectors = bank.model.get_input_embeddings()(text)
    joined = torch.cat([bank["long"].to(vectors.dtype), vectors])
    return relative(logits[0], bank.model.base_model(inputs_embeds=joined[None]).logits[0, -1]) < 1e-5


def test_one_objects_retreat_leaves_the_others_as_they_are() -> None:
    model = build("llama")
    a, b = (add_prompts(spf.SoftPromptModel(model)) for _ in range(2))
    bank = PromptBank(b)
    assert is_right(a) and is_right(b) and bank_is_right(bank)
    assert a.runner is not None
    a.runner.give_up("asked to")
    assert is_right(a) and is_right(b) and bank_is_right(bank)
    assert [x.execution_report().execution for x in (a, b)] == ["padded", "shared"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("through", ["method", "configuration"])
def test_another_attention_implementation_set_later(implementation: str, through: str) -> None:
    tuned = tuned_model("llama")
    bank = PromptBank(tuned)
    assert is_right(tuned) and bank_is_right(bank)
    model = tuned.base_model
    if through == "method":
        model.set_attn_implementation(implementation)
    else:
        model.config._attn_implementation = implementation
    assert is_right(tuned) and bank_is_right(bank)
    assert tuned.execution_report().execution == "shared"
    del bank
    tuned.unload()
    gc.collect()
    assert model.config._attn_implementation == implementation


def test_a_batch_that_meets_another_attention_fails_and_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tuned_model("llama")
    assert is_right(tuned)
    model, forward, times = tuned.base_model, tuned.base_model.model.forward, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not times[0]:
            times[0] += 1
            model.config._attn_implementation = "sdpa"
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", interrupted)
    assert is_right(tuned) and times == [1]
    assert tuned.execution_report().execution == "shared"


def test_another_attention_between_forward_and_recomputation_is_an_error() -> None:
    tuned = tuned_model("llama").train()
    tuned.gradient_checkpointing_enable()
    ids, mask = batch()
    loss = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    tuned.base_model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_recomputation_after_a_retreat() -> None:
    tuned = tuned_model("llama").train()
    ids, mask = batch()
    tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
    expected = tuned.prompts["long"].grad.clone()
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable()
    loss = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    tuned.runner.give_up("asked to")
    loss.backward()
    assert relative(tuned.prompts["long"].grad, expected) < 1e-5
    del loss
    gc.collect()
    assert tuned.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("ending", ["del", "unload", "retreat and del"])
def test_the_last_object_gives_the_base_back(ending: str) -> None:
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids, mask = batch()
    expected = model(ids, attention_mask=mask).logits
    a, b = (add_prompts(spf.SoftPromptModel(model)) for _ in range(2))
    deep = spf.DeepPromptModel(model)
    assert is_right(a) and is_right(b)
    if ending.startswith("retreat"):
        b.runner.give_up("asked to")
    if ending == "unload":
        assert deep.unload() is model and b.unload() is model and b.get_base_model() is model
        with pytest.raises(RuntimeError, match="this SoftPromptModel was unloaded"):
            b(ids, mask, prompt_ids=ROWS)
        with pytest.raises(RuntimeError, match="this DeepPromptModel was unloaded"):
            deep.generate(ids)
    del b, deep
    gc.collect()
    assert is_right(a) and not any(p.requires_grad for p in model.parameters())
    if ending == "unload":
        a.unload()
    del a
    gc.collect()
    assert type(model.config._attn_implementation) is str and model.config._attn_implementation == "sdpa"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_models_that_share_a_configuration() -> None:
    import transformers as tf
    from support.tiny_models import LLAMA

    config = tf.LlamaConfig(**LLAMA)
    a, b = (add_prompts(spf.SoftPromptModel(tf.LlamaForCausalLM(config).eval())) for _ in range(2))
    assert is_right(a) and is_right(b)
    del a
    gc.collect()
    assert config._attn_implementation != "sdpa" and is_right(b)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_run_and_are_independent(way: str) -> None:
    tuned = tuned_model("llama")
    assert is_right(tuned)
    other = copy.deepcopy(tuned) if way == "deepcopy" else pickle.loads(pickle.dumps(tuned))
    assert other.base_model is not tuned.base_model and is_right(other)
    assert other.execution_report().execution == "shared"
    tuned.unload()
    assert is_right(other)
    model = other.unload()
    gc.collect()
    assert model.config._attn_implementation == "sdpa" and all(p.requires_grad for p in model.parameters())


def test_a_copied_base_names_its_own_attention() -> None:
    tuned = tuned_model("llama")
    copies = [copy.deepcopy(tuned.base_model), pickle.loads(pickle.dumps(tuned.base_model))]
    assert [type(m.config._attn_implementation) for m in copies] == [str, str]
    assert [m.config._attn_implementation for m in copies] == ["sdpa", "sdpa"]


@pytest.mark.parametrize("used", [True, False])
def test_a_saved_object_runs_in_another_process(tmp_path: Path, used: bool) -> None:
    tuned = tuned_model("llama")
    deep = spf.DeepPromptModel(tuned.base_model)
    deep.add_prompt("long", 3, seed=0)
    ids, mask = batch()
    expected = [m(ids, mask, prompt_ids="long").logits for m in (tuned, deep)] if used else None
    torch.save({"tuned": tuned, "deep": deep, "base": tuned.base_model, "ids": ids, "mask": mask}, tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load(sys.argv[1], weights_only=False); i, m = x['ids'], x['mask'];"
        "x['base'](i); y = [x[k](i, m, prompt_ids='long').logits for k in ('tuned', 'deep')];"
        "torch.save((y, x['tuned'].execution_report().execution), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.pt", tmp_path / "y.pt"], check=True)
    got, execution = torch.load(tmp_path / "y.pt")
    expected = expected or [m(ids, mask, prompt_ids="long").logits for m in (tuned, deep)]
    assert execution == "shared" and all(relative(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


def test_threads_that_run_while_others_come_and_go() -> None:
    model = build("llama")
    tuned = add_prompts(spf.SoftPromptModel(model))
    assert is_right(tuned)
    wrong: list[bool] = []

    def run() -> None:
        ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = tuned(ids, prompt_ids="long").logits
            wrong.extend(not torch.equal(tuned(ids, prompt_ids="long").logits, expected) for _ in range(20))

    workers = [threading.Thread(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(20):
        other = spf.SoftPromptModel(model, check=False)
        other.runner.give_up("asked to")
        del other
    for worker in workers:
        worker.join()
    assert len(wrong) == 60 and not any(wrong)
