"""Banks of compiled prompts, pipelines on them: mixed batches equal one-by-one runs, bad requests harm nobody else."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import DECODERS, build
from support.tiny_reviews import WORDS, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.compiled import storage
from softprompt_fast.compiled.continuation import gather_prefixes
from softprompt_fast.compiled.slots import SlotTable
from softprompt_fast.evaluation.combine import combine_members
from softprompt_fast.hf.loading import SMOLLM2, load_base_model
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.tasks.task import Task

LENGTHS = {"short": 1, "middle": 7, "long": 60}
TEXTS = ["fine film", "very very dull plot film", "great", "no plot", "very lovely film plot : yes", "poor"]
NAMES = ["middle", "long", None, "short", "long", "middle"]
LABELS = {"good": "fine", "bad": "dull"}
UNCOMPILED = {"gptj", "bloom", "falcon", "gpt-neo", "mpt"}


def filled(model: Any, **options: Any) -> PromptBank:
    bank = PromptBank(model, **options)
    generator = torch.Generator().manual_seed(1)
    for name, length in LENGTHS.items():
        bank.add(name, torch.randn(length, bank.model.prompts.embedding_dim, generator=generator))
    return bank


def pipeline(name: str = "llama", **options: Any) -> SoftPromptPipeline:
    return SoftPromptPipeline(filled(build(name), **options), tiny_tokenizer())


def alone(pipe: SoftPromptPipeline, text: str, name: str | None) -> torch.Tensor:
    """[T, V], logits of a text behind its prompt, by the model itself, without padding, cache or packing."""
    base = pipe.bank.model.base_model
    vectors = base.get_input_embeddings()(torch.tensor(pipe.tokenizer(text).input_ids))
    prompt = vectors[:0] if name is None else pipe.bank[name]
    with torch.no_grad():
        return base(inputs_embeds=torch.cat([prompt, vectors])[None], use_cache=False).logits[0, len(prompt) :]


# --- mixed batches equal one-by-one runs ---


@pytest.mark.parametrize("name", DECODERS)
def test_a_mixed_batch_equals_each_row_alone(name: str) -> None:
    pipe = pipeline(name)
    words = [WORDS.index(word) for word in LABELS.values()]
    scores = pipe.score(TEXTS, ["yes no film"] * len(TEXTS), NAMES)
    for text, prompt, found in zip(TEXTS, NAMES, scores, strict=True):
        row = alone(pipe, f"{text} yes no film", prompt).log_softmax(-1)
        tokens = [WORDS.index(word) for word in ("yes", "no", "film")]
        expected = row[torch.arange(-4, -1), tokens]
        assert np.allclose(found["token_log_probabilities"], expected, rtol=1e-5, atol=1e-5)
        assert found["log_probability"] == pytest.approx(expected.sum().item(), rel=1e-5)
    for text, prompt, found in zip(TEXTS, NAMES, pipe.classify(TEXTS, NAMES, labels=LABELS), strict=True):
        expected = alone(pipe, text, prompt)[-1][words].softmax(-1)
        assert np.allclose(list(found["scores"].values()), expected, atol=1e-5)
    compiled = [] if name in UNCOMPILED else list(LENGTHS)
    assert sorted(pipe.bank.compiled) == sorted(compiled), pipe.bank.uncompiled


@pytest.mark.parametrize("name", DECODERS)
def test_generated_text_does_not_depend_on_the_batch(name: str) -> None:
    pipe = pipeline(name)
    base = pipe.bank.model.base_model
    base.generation_config.eos_token_id = None
    ids = [pipe.tokenizer(text).input_ids for text in TEXTS]
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    with pipe.bank.use(NAMES) as view:
        together = pipe.engine.generate(view, ids, NAMES, options)
    assert pipe.engine.continuation.in_place or name in UNCOMPILED
    for text, prompt, found in zip(TEXTS, NAMES, together, strict=True):
        vectors = base.get_input_embeddings()(torch.tensor(pipe.tokenizer(text).input_ids))
        start = vectors if prompt is None else torch.cat([pipe.bank[prompt], vectors])
        mask = torch.ones(1, len(start), dtype=torch.long)
        tokens = base.generate(inputs_embeds=start[None], attention_mask=mask, **options)
        assert torch.equal(found, tokens[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_prompts_that_cannot_be_read_in_place_are_gathered(name: str) -> None:
    pipe = pipeline(name)
    expected = pipe.generate(TEXTS, NAMES, max_new_tokens=32, do_sample=False)
    pipe.engine.continuation.in_place = False
    assert pipe.generate(TEXTS, NAMES, max_new_tokens=32, do_sample=False) == expected


def test_labels_of_several_tokens_and_templates_of_tasks() -> None:
    pipe = pipeline()
    task = Task("classification", "{text} : {more}", "label", {"a": "very fine", "b": "dull", "c": "no"})
    pipe.bank.add("tasked", pipe.bank["middle"], task=task)
    row = {"text": "film", "more": "plot"}
    (found,) = pipe.classify([row], "tasked")
    assert list(found["scores"]) == ["a", "b", "c"]
    expected = []
    for word in task.label_words.values():
        ids = pipe.tokenizer(word).input_ids
        logits = alone(pipe, f"film : plot {word}", "middle").log_softmax(-1)
        expected.append(sum(logits[-len(ids) - 1 + i, token].item() for i, token in enumerate(ids)))
    assert np.allclose(list(found["scores"].values()), torch.tensor(expected).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_run_padded(name: str) -> None:
    pipe = pipeline(name)
    assert pipe.bank.uncompiled is not None
    rows = pipe.classify(TEXTS, NAMES, labels={"good": "very fine", "bad": "dull"})
    texts = pipe.generate(TEXTS, NAMES, max_new_tokens=8, do_sample=False)
    for i, (text, prompt) in enumerate(zip(TEXTS, NAMES, strict=True)):
        (one,) = pipe.classify([text], prompt, labels={"good": "very fine", "bad": "dull"})
        assert np.allclose(list(one["scores"].values()), list(rows[i]["scores"].values()), atol=1e-5)
        assert pipe.generate([text], prompt, max_new_tokens=8, do_sample=False)[0] == texts[i]


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "t5"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_embeddings(name: str, pooling: str) -> None:
    pipe = pipeline(name)
    together = pipe.embed(TEXTS, NAMES, pooling=pooling)
    for text, prompt, found in zip(TEXTS, NAMES, together, strict=True):
        (one,) = pipe.embed([text], prompt, pooling=pooling)
        assert found["embedding"].shape == (32,)
        assert np.allclose(found["embedding"], one["embedding"], atol=1e-4)


def test_a_classification_head_reads_behind_the_prompt() -> None:
    model = build("llama", head="SequenceClassification")
    pipe = SoftPromptPipeline(filled(model), tiny_tokenizer())
    found = pipe.classify(TEXTS, NAMES)
    for text, prompt, row in zip(TEXTS, NAMES, found, strict=True):
        vectors = model.get_input_embeddings()(torch.tensor(pipe.tokenizer(text).input_ids))
        start = vectors if prompt is None else torch.cat([pipe.bank[prompt], vectors])
        with torch.no_grad():
            expected = model(inputs_embeds=start[None]).logits[0].softmax(-1)
        assert np.allclose(list(row["scores"].values()), expected, atol=1e-5)


def test_generation_options() -> None:
    pipe = pipeline()
    beams = pipe.generate(TEXTS, NAMES, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    for text, prompt, found in zip(TEXTS, NAMES, beams, strict=True):
        options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        assert pipe.generate([text], prompt, **options)[0] == found and len(found["texts"]) == 2
    torch.manual_seed(0)
    sampled = pipe.generate(TEXTS, NAMES, max_new_tokens=6, do_sample=True)
    torch.manual_seed(0)
    assert sampled == pipe.generate(TEXTS, NAMES, max_new_tokens=6, do_sample=True)


def test_a_streamer_sees_the_text_and_no_stand_ins() -> None:
    pipe = pipeline()
    pipe.bank.model.base_model.generation_config.eos_token_id = None
    seen: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    ids = pipe.tokenizer("fine film").input_ids
    with pipe.bank.use(["long"]) as view:
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "streamer": Streamer()}
        tokens = pipe.engine.generate(view, [ids], ["long"], options)[0].tolist()
    assert seen == [ids, *([token] for token in tokens), []]


def test_smollm2_with_prompts_of_1_to_200_tokens() -> None:
    model, tokenizer = load_base_model(SMOLLM2, "float32", "cpu")
    bank = PromptBank(model)
    table = model.get_input_embeddings().weight
    for length in (1, 20, 100, 200):
        bank.add(f"p{length}", table[torch.randint(3, len(table), (length,))].detach())
    texts = ["The capital of France is", "A charming film.\nSentiment:", "Once upon a time, there was", "2 + 2 ="]
    texts, names = texts + texts[:1], ["p200", "p1", "p20", "p100", None]
    pipe = SoftPromptPipeline(bank, tokenizer)
    ids = [tokenizer(text).input_ids for text in texts]
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    places = torch.tensor([(row, len(text) - 1) for row, text in enumerate(ids)])
    with bank.use(names) as view:
        logits = pipe.engine.logits_behind(view, ids, names, places)
        tokens = pipe.engine.generate(view, ids, names, options)
    assert pipe.engine.continuation.in_place and bank.uncompiled is None
    for row, (text, name) in enumerate(zip(texts, names, strict=True)):
        expected = alone(pipe, text, name)[-1]
        assert (logits[row] - expected).abs().max() < 1e-5 * expected.abs().max()
        vectors = table[torch.tensor(ids[row])]
        start = (vectors if name is None else torch.cat([bank[name], vectors]))[None]
        mask = torch.ones(start.shape[:2], dtype=torch.long)
        assert torch.equal(tokens[row], model.generate(inputs_embeds=start, attention_mask=mask, **options)[0])
    (stopped,) = pipe.generate(texts[:1], max_new_tokens=20, do_sample=False, stop_strings=["Paris"])
    assert stopped["text"].endswith("Paris") and pipe.engine.continuation.in_place


# --- the bank ---


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


def test_gathered_prefixes_are_those_of_the_table() -> None:
    compiled = torch.randn(3, 2, 9, 2, 4)
    layers = gather_prefixes(compiled, [(2, 3), (0, 0), (5, 4)], 4)
    for layer, (keys, values) in enumerate(layers):
        assert keys.shape == (3, 2, 4, 4)
        assert torch.equal(keys[0, :, :3], compiled[layer, 0, 2:5].transpose(0, 1)) and not keys[0, :, 3].any()
        assert torch.equal(values[2], compiled[layer, 1, 5:9].transpose(0, 1)) and not values[1].any()


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


# --- bad requests ---


def test_a_bad_row_gets_an_error_and_the_others_their_answers() -> None:
    pipe = pipeline()
    texts = ["fine film", "", "great", "film " * 70, "film " * 500, "no plot"]
    names = ["middle", "middle", "unknown", "long", None, "long"]
    expected = ["", "the text is empty", "no prompt 'unknown' in the bank", "context of 128", "context of 128", ""]
    for found in (
        pipe.classify(texts, names, labels=LABELS),
        pipe.score(texts, ["yes"] * 6, names),
        pipe.generate(texts, names, max_new_tokens=3, do_sample=False),
        pipe.embed(texts, names),
    ):
        for row, message in zip(found, expected, strict=True):
            assert (message in row.get("error", "")) and ("error" in row) == bool(message), row
    (row,) = pipe.generate(["film " * 60], "long", max_new_tokens=20)
    assert "60 tokens" not in row["error"] and "20 new ones" in row["error"]


def test_an_exception_in_a_batch_costs_only_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    real = pipe.engine.logits_behind

    def fails(view: Any, texts: Any, names: Any, places: Any) -> Any:
        if any(len(text) == 5 for text in texts):
            raise RuntimeError("out of memory")
        return real(view, texts, names, places)

    monkeypatch.setattr(pipe.engine, "logits_behind", fails)
    found = pipe.classify(TEXTS, NAMES, labels=LABELS)
    assert [row.get("error") for row in found] == [None, "out of memory", None, None, None, None]


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


def test_bad_arguments() -> None:
    pipe = pipeline()
    with pytest.raises(TypeError, match="`texts` must be a list"):
        pipe.classify("fine")
    with pytest.raises(ValueError, match="one for each of the 2 texts, got 1"):
        pipe.classify(["fine", "dull"], ["middle"])
    with pytest.raises(ValueError, match="`combine` must be one of"):
        pipe.classify(["fine"], combine="best")
    with pytest.raises(ValueError, match="`ensemble` must name prompts"):
        pipe.classify(["fine"], "middle", ensemble=["short"])
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        pipe.embed(["fine"], pooling="max")
    with pytest.raises(ValueError, match="`max_batch_rows` must be positive"):
        SoftPromptPipeline(pipe.bank, pipe.tokenizer, max_batch_rows=0)
    with pytest.raises(ValueError, match="`storage` must be one of"):
        PromptBank(build("llama"), storage="disk")
    (row,) = pipe.classify(["fine"], "middle")
    assert "`labels` must be given" in row["error"]
    (row,) = pipe.classify(["fine"], "middle", labels=["one word"])
    assert "at least two words" in row["error"]


# --- ensembles ---


def test_ensembles_equal_their_members() -> None:
    pipe = pipeline()
    names = list(LENGTHS)
    words = [WORDS.index(word) for word in LABELS.values()]
    for how in ("mean_probability", "mean_logit", "majority"):
        for text, found in zip(TEXTS, pipe.classify(TEXTS, labels=LABELS, ensemble=names, combine=how), strict=True):
            logits = torch.stack([alone(pipe, text, name)[-1][words] for name in names]).double()
            if how == "mean_probability":
                expected = logits.softmax(-1).mean(0)
            elif how == "mean_logit":
                expected = logits.mean(0).softmax(-1)
            else:
                expected = torch.bincount(logits.argmax(-1), minlength=2) / 3
            assert np.allclose(list(found["scores"].values()), expected, atol=1e-5)
            agreeing = (logits.argmax(-1) == list(LABELS).index(found["prediction"])).double().mean()
            assert found["agreement"] == pytest.approx(agreeing.item())


def test_an_ensemble_reads_each_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    read: list[Any] = []
    real = pipe._encode
    monkeypatch.setattr(pipe, "_encode", lambda text, *rest: read.append(text) or real(text, *rest))
    pipe.classify(TEXTS, labels=LABELS, ensemble=list(LENGTHS))
    assert read == TEXTS


def test_a_tie_of_votes_goes_to_the_likelier_label() -> None:
    logits = np.array([[0.0, 3.0], [0.5, 0.0]])
    assert combine_members(["a", "b"], logits, "majority")["prediction"] == "b"
    assert combine_members(["a", "b"], logits[:, ::-1], "majority")["prediction"] == "a"


def test_results_are_seen_as_they_come_and_kept_in_order() -> None:
    pipe = SoftPromptPipeline(filled(build("llama")), tiny_tokenizer(), max_batch_rows=2, max_batch_tokens=8)
    seen: list[int] = []
    found = pipe.classify([*TEXTS, ""], [*NAMES, None], labels=LABELS, on_result=lambda i, row: seen.append(i))
    assert sorted(seen) == list(range(7)) and seen != list(range(7))
    assert found[:6] == pipeline().classify(TEXTS, NAMES, labels=LABELS) or all(
        np.allclose(list(a["scores"].values()), list(b["scores"].values()), atol=1e-5)
        for a, b in zip(found[:6], pipeline().classify(TEXTS, NAMES, labels=LABELS), strict=True)
    )


def test_the_fingerprint_covers_every_weight() -> None:
    model, same = build("llama"), build("llama")
    assert storage.fingerprint(model) == storage.fingerprint(same)
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert storage.fingerprint(other) != storage.fingerprint(model)
