"""Banks of compiled prompts: the budget, threads, files and bad prompts."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.serving import LABELS, LENGTHS, NAMES, TEXTS, alone, filled, pipeline
from support.tiny_models import build
from support.tiny_reviews import WORDS, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.compiled import storage
from softprompt_fast.compiled.slots import SlotTable
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank


def test_compiled_prompts_stay_within_the_budget() -> None:
    model = build("llama")
    token = PromptBank(model).bytes_per_token
    assert token == 3 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, float32
    bank = filled(model, budget=65 * token)
    pipe = SoftPromptPipeline(bank, tiny_tokenizer())
    expected = pipeline().classify(TEXTS, NAMES, labels=LABELS)
    bank.compile(["short", "middle"])
    assert bank.compiled == ["short", "middle"] and bank.stats()["compiled_bytes"] == 8 * token
    bank.compile(["short"])  # used last
    bank.compile(["long"])
    assert bank.compiled == ["short", "long"] and bank.stats()["evictions"] == 1
    found = pipe.classify(TEXTS, NAMES, labels=LABELS)  # 68 tokens at once: more than the budget
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(list(one["scores"].values()), list(other["scores"].values()), atol=1e-5)


def test_without_a_budget_prompts_run_with_their_batch(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline(budget=0)
    found = pipe.classify(TEXTS, NAMES, labels=LABELS)
    assert pipe.bank.compiled == [] and "budget of 0 bytes" in str(pipe.bank.uncompiled)
    for one, other in zip(found, pipeline().classify(TEXTS, NAMES, labels=LABELS), strict=True):
        assert np.allclose(list(one["scores"].values()), list(other["scores"].values()), atol=1e-5)


def test_compiled_prompts_may_lie_on_the_host() -> None:
    pipe, other = pipeline(storage="host"), pipeline()
    for options in ({}, {"reverse": True}):
        texts, names = (TEXTS[::-1], NAMES[::-1]) if options else (TEXTS, NAMES)
        found, expected = (p.classify(texts, names, labels=LABELS) for p in (pipe, other))
        assert found == expected


def test_a_replaced_prompt_answers_at_once_and_old_batches_finish() -> None:
    pipe = pipeline()
    (before,) = pipe.score(["fine film"], ["yes"], "middle")
    with pipe.bank.use(["middle"]) as view:
        old = view.compiled[:, :, slice(*_range(view.prefixes[0]))].clone()
        pipe.bank.add("middle", pipe.bank["middle"] * 2, replace=True)
        pipe.bank.compile()
        assert torch.equal(view.compiled[:, :, slice(*_range(view.prefixes[0]))], old)
    (after,) = pipe.score(["fine film"], ["yes"], "middle")
    assert after != before
    assert after["log_probability"] == pytest.approx(alone(pipe, "fine film yes", "middle").log_softmax(-1)[-2, 10 + 4])
    pipe.bank.remove("middle")
    (gone,) = pipe.score(["fine film"], ["yes"], "middle")
    assert "no prompt 'middle'" in gone["error"]


def _range(prefix: tuple[int, int]) -> tuple[int, int]:
    return prefix[0], prefix[0] + prefix[1]


def test_threads_add_and_remove_while_others_are_answered() -> None:
    pipe = pipeline(budget=100 * PromptBank(build("llama")).bytes_per_token)
    expected = pipe.score(TEXTS, ["yes"] * len(TEXTS), NAMES)
    failures: list[Any] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            found = pipe.score(TEXTS, ["yes"] * len(TEXTS), NAMES)
            for one, other in zip(found, expected, strict=True):
                if abs(one.get("log_probability", 1e9) - other["log_probability"]) > 1e-4:
                    failures.append((one, other))

    def change() -> None:
        for i in range(40):
            pipe.bank.add(f"extra{i}", torch.randn(20, 32))
            pipe.bank.compile([f"extra{i}"])
            pipe.bank.add("middle", pipe.bank["middle"], replace=True)
            pipe.bank.remove(f"extra{i}")

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    change()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    assert pipe.bank.stats()["compiled_bytes"] <= 100 * pipe.bank.bytes_per_token


def test_slots_are_reused_and_joined() -> None:
    table = SlotTable((1, 1, 1, 2), torch.float32, "cpu", 10)
    runs = [table.allocate(n) for n in (3, 3, 4)]
    assert runs == [0, 3, 6] and table.allocate(1) is None and table.free == 0
    table.tensor[:] = torch.arange(10)[:, None, None]
    table.release(0, 3)
    table.release(6, 4)
    assert table.allocate(5) is None and table.free == 7  # no run of five
    table.release(3, 3)
    assert table.allocate(10) == 0
    growing = SlotTable((1, 1, 1, 1), torch.float32, "cpu", 100)
    first = growing.allocate(2)
    growing.tensor[:, :, :2] = 7
    for _ in range(8):
        growing.allocate(5)
    assert first == 0 and (growing.tensor[:, :, :2] == 7).all() and growing.size <= 84


def test_compiled_prompts_on_disk(tmp_path: Path) -> None:
    bank = filled(build("llama"))
    bank.save_compiled(tmp_path)
    model = build("llama")
    other = PromptBank(model)
    assert other.load_compiled(tmp_path) == sorted(LENGTHS) and sorted(other.compiled) == sorted(LENGTHS)
    found, expected = (SoftPromptPipeline(b, tiny_tokenizer()).score(TEXTS, ["yes"] * 6, NAMES) for b in (other, bank))
    assert found == expected and other.misses == 0
    with torch.no_grad():
        changed = build("llama")
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match="compiled with other weights"):
        PromptBank(changed).load_compiled(tmp_path)
    with pytest.raises(ValueError, match="another prompt than the bank's 'middle'"):
        again = PromptBank(model)
        again.add("middle", torch.randn(7, 32))
        again.load_compiled(tmp_path)
    for wrong in (torch.zeros(3, 2, 6, 2, 8), torch.full((3, 2, 7, 2, 8), torch.nan)):
        storage.save(tmp_path / "other" / "middle.safetensors", wrong, bank["middle"], model)
        with pytest.raises(ValueError, match="`compiled` must be finite numbers"):
            PromptBank(model).load_compiled(tmp_path / "other")
    (tmp_path / "middle.safetensors").write_bytes((tmp_path / "middle.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        PromptBank(model).load_compiled(tmp_path)


def test_a_wrong_compiled_result_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    pipe.bank.compile()
    pipe.bank._table.tensor.mul_(1.5)
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        found = pipe.classify(TEXTS, NAMES, labels=LABELS)
    assert "they differ by" in caplog.text and pipe.bank.uncompiled is not None
    expected = alone(pipe, TEXTS[1], NAMES[1])[-1][[WORDS.index(word) for word in LABELS.values()]].softmax(-1)
    assert np.allclose(list(found[1]["scores"].values()), expected, atol=1e-5)


def test_bad_prompts_are_refused(tmp_path: Path) -> None:
    bank = PromptBank(build("llama"))
    good = torch.randn(4, 32)
    for name in ("../outside", "a/b", "", ".", "a b", "-x", "x" * 200, "é"):
        with pytest.raises(ValueError, match="`name` must be"):
            bank.add(name, good)
    broken = good.clone()
    broken[2, 3] = torch.nan
    for source, message in ((broken, "finite"), (good[:, :8], r"shape \[P, 32\]"), (good.int(), "floating-point")):
        with pytest.raises(ValueError, match=message):
            bank.add("p", source)
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("p", init=good)
    tuned.save_pretrained(tmp_path)
    weights = tmp_path / "p" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:50], b"not a tensor file", b""):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="must be a safetensors file"):
            bank.add("p", tmp_path / "p")
    with pytest.raises(FileNotFoundError):
        bank.add("p", tmp_path / "nowhere")
    weights.write_bytes(whole)
    assert bank.add_directory(tmp_path) == ["p"] and torch.equal(bank["p"], good)
    with pytest.raises(ValueError, match="pass replace=True"):
        bank.add("p", good)
    with pytest.raises(KeyError, match="no prompt 'q'"):
        bank.remove("q")


def test_the_fingerprint_covers_every_weight() -> None:
    model, same = build("llama"), build("llama")
    assert storage.fingerprint(model) == storage.fingerprint(same)
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert storage.fingerprint(other) != storage.fingerprint(model)
