"""Pipelines on a bank: mixed batches equal one-by-one runs, bad requests harm no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.serving import LABELS, LENGTHS, NAMES, TEXTS, UNCOMPILED, alone, filled, pipeline
from support.tiny_models import DECODERS, build
from support.tiny_reviews import WORDS, tiny_tokenizer

from softprompt_fast.evaluation.ensembles import combine_members
from softprompt_fast.hf.loading import SMOLLM2, load_base_model
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.tasks.task import Task

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
    assert pipe.bank.uncompiled is None or name in UNCOMPILED
    for text, prompt, found in zip(TEXTS, NAMES, together, strict=True):
        vectors = base.get_input_embeddings()(torch.tensor(pipe.tokenizer(text).input_ids))
        start = vectors if prompt is None else torch.cat([pipe.bank[prompt], vectors])
        mask = torch.ones(1, len(start), dtype=torch.long)
        tokens = base.generate(inputs_embeds=start[None], attention_mask=mask, **options)
        assert torch.equal(found, tokens[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_prompts_that_cannot_be_read_in_place_are_gathered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(name)
    expected = pipe.generate(TEXTS, NAMES, max_new_tokens=32, do_sample=False)
    monkeypatch.setattr("softprompt_fast.compiled.cache.available", lambda query: False)
    assert pipe.generate(TEXTS, NAMES, max_new_tokens=32, do_sample=False) == expected


def test_labels_of_several_tokens_and_templates_of_tasks() -> None:
    pipe = pipeline()
    task = Task("classification", "{text} : {more}", "label", {"a": "very fine", "b": "very dull", "c": "no"})
    pipe.bank.add("tasked", pipe.bank["middle"], task=task)
    row = {"text": "film", "more": "plot"}
    (found,) = pipe.classify([row], "tasked")
    assert list(found["scores"]) == ["a", "b", "c"]
    very, fine, dull, no = (pipe.tokenizer(word).input_ids[0] for word in ("very", "fine", "dull", "no"))
    logits = alone(pipe, "film : plot very", "middle")
    first, second = logits[-2, [very, no]].softmax(-1), logits[-1, [fine, dull]].softmax(-1)
    expected = torch.stack([first[0] * second[0], first[0] * second[1], first[1]])
    assert np.allclose(list(found["scores"].values()), expected.detach(), atol=1e-5)


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
        logits = pipe.engine.logits_at(view, ids, names, places)
        tokens = pipe.engine.generate(view, ids, names, options)
    assert bank.uncompiled is None
    for row, (text, name) in enumerate(zip(texts, names, strict=True)):
        expected = alone(pipe, text, name)[-1]
        assert (logits[row] - expected).abs().max() < 1e-5 * expected.abs().max()
        vectors = table[torch.tensor(ids[row])]
        start = (vectors if name is None else torch.cat([bank[name], vectors]))[None]
        mask = torch.ones(start.shape[:2], dtype=torch.long)
        assert torch.equal(tokens[row], model.generate(inputs_embeds=start, attention_mask=mask, **options)[0])
    (stopped,) = pipe.generate(texts[:1], max_new_tokens=20, do_sample=False, stop_strings=["Paris"])
    assert stopped["text"].endswith("Paris") and bank.uncompiled is None


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
    real = pipe.engine.logits_at

    def fails(view: Any, texts: Any, names: Any, places: Any) -> Any:
        if any(len(text) == 5 for text in texts):
            raise RuntimeError("out of memory")
        return real(view, texts, names, places)

    monkeypatch.setattr(pipe.engine, "logits_at", fails)
    found = pipe.classify(TEXTS, NAMES, labels=LABELS)
    assert [row.get("error") for row in found] == [None, "out of memory", None, None, None, None]


def test_bad_arguments() -> None:
    pipe = pipeline()
    with pytest.raises(TypeError, match="`texts` must be a list"):
        pipe.classify("fine")
    with pytest.raises(ValueError, match="one for each of the 2 texts, got 1"):
        pipe.classify(["fine", "dull"], ["middle"])
    with pytest.raises(ValueError, match="`combine` must be one of"):
        pipe.classify(["fine"], combine="best")
    with pytest.raises(ValueError, match="`ensemble` cannot be combined with `prompts`"):
        pipe.classify(["fine"], "middle", ensemble=["short"])
    with pytest.raises(ValueError, match="`ensemble` must name at least one prompt"):
        pipe.classify(["fine"], ensemble=[])
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
    real = pipe.encoder.encode
    monkeypatch.setattr(pipe.encoder, "encode", lambda text, *rest: read.append(text) or real(text, *rest))
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt"])
def test_the_context_limit_is_the_models_own(name: str) -> None:
    """MPT calls it ``max_seq_len``."""
    pipe = pipeline(name)
    assert pipe.context_length == 128
    fits, too_long = pipe.classify(["film " * 68, "film " * 69], "long", labels=LABELS)
    assert "prediction" in fits
    assert too_long == {
        "error": "a text must fit into the model's context of 128 tokens, got 69 tokens after a prompt of 60"
    }


def test_one_batch_scores_words_of_one_and_of_several_tokens() -> None:
    pipe = pipeline()
    one = Task("classification", "{text}", "label", {"a": "fine", "b": "dull"})
    several = Task("classification", "{text}", "label", {"a": "very fine", "b": "dull"})
    pipe.bank.add("one", pipe.bank["middle"], task=one)
    pipe.bank.add("several", pipe.bank["middle"], task=several)
    names = ["one", "several"] * 3
    for text, name, result in zip(TEXTS, names, pipe.classify(TEXTS, names), strict=True):
        (expected,) = pipe.classify([text], name)
        assert result["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def test_logits_that_are_not_finite_are_an_error_of_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    real = pipe.engine.logits_at

    def broken(view: Any, texts: Any, names: Any, places: Any) -> Any:
        logits = real(view, texts, names, places)
        if "short" in names:
            logits[names.index("short"), 3] = torch.nan
        return logits

    monkeypatch.setattr(pipe.engine, "logits_at", broken)
    found = pipe.classify(["fine film", "great"], ["short", "middle"], labels=LABELS)
    assert found[0] == {"error": "the model's logits are not finite"} and "prediction" in found[1]
