"""``accelerate`` changes nothing that it cannot run, ``restore`` undoes it, and ``compat="exact"`` is PEFT."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.peft_models import (
    IDS,
    LENGTHS,
    VIRTUAL,
    adapter_config,
    base_model,
    batch,
    counted,
    peft_model,
)

import softprompt_fast as spf

peft = pytest.importorskip("peft")


def snapshot(model: Any) -> tuple[Any, ...]:
    """Everything of a model that must not change."""
    return (
        type(model),
        dict(vars(model)),
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        model.config._attn_implementation,
        set(vars(model.base_model)) if hasattr(model, "base_model") else None,
    )


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_a_class_that_is_derived_from_pefts(kind: str) -> None:
    class Derived(peft.PeftModelForCausalLM):  # type: ignore[misc, name-defined]
        pass

    model, inputs = Derived(base_model("llama"), adapter_config(kind=kind)), batch("right")
    expected = model.eval()(**inputs).loss
    assert isinstance(spf.accelerate(model), Derived)
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_restore_undoes_everything(kind: str) -> None:
    model = peft_model(kind=kind)
    inputs = batch("left")
    before, expected = snapshot(model), model(**inputs).logits.detach()
    assert spf.accelerate(model) is model
    assert model.config._attn_implementation != "sdpa"
    model(**inputs).loss.backward()
    with model.disable_adapter():
        model(**inputs)
    model.generate(IDS, max_new_tokens=2)
    model.zero_grad()
    assert spf.restore(model) is model
    assert snapshot(model) == before
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_restore_inside_disable_adapter() -> None:
    model = spf.accelerate(peft_model().eval())
    expected = peft_model().eval()(**batch("left")).loss
    with model.disable_adapter():
        spf.restore(model)
    torch.testing.assert_close(model(**batch("left")).loss, expected)
    with model.disable_adapter():
        pass
    spf.accelerate(model)  # PEFT has left its methods on the instance
    with counted(model) as widths:
        model(**batch("left"))
    assert widths[-1] == VIRTUAL + sum(LENGTHS)


def test_accelerating_twice_changes_the_compatibility_only() -> None:
    model = spf.accelerate(peft_model().eval())
    inputs = batch("left")
    ours = model(**inputs).loss
    assert spf.accelerate(model, compat="exact") is model
    peft_loss = model(**inputs).loss
    assert abs(peft_loss - ours) > 1e-3
    spf.restore(model)
    torch.testing.assert_close(model(**inputs).loss, peft_loss, rtol=0, atol=0)


def lora() -> Any:
    return peft.get_peft_model(base_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))


def multitask() -> Any:
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_tasks=2, num_transformer_submodules=1
    )
    return peft.get_peft_model(base_model("llama"), config)


def prefix_of_a_classifier() -> Any:
    return peft_model("llama", "SequenceClassification", "PrefixTuning")


def features() -> Any:
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=VIRTUAL)
    return peft.get_peft_model(base_model("bert", "MaskedLM"), config)


def replaced_forward() -> Any:
    model = peft_model()
    model.forward = lambda **inputs: None
    return model


def own_forward() -> Any:
    class Mine(peft.PeftModelForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **keywords: Any) -> Any:
            return super().forward(*args, **keywords)

    return Mine(base_model("llama"), adapter_config())


def prefix_of_bloom() -> Any:
    return peft_model("bloom", kind="PrefixTuning")


REFUSED = {
    lora: "LORA adapter 'default' cannot be accelerated",
    multitask: "MULTITASK_PROMPT_TUNING adapter 'default' cannot be accelerated",
    prefix_of_a_classifier: "PREFIX_TUNING adapter 'default' of LlamaForSequenceClassification",
    prefix_of_bloom: "BloomForCausalLM cannot run deep prompts",
    features: "must be one of PEFT's",
    replaced_forward: "its `forward` was replaced",
    own_forward: "Mine cannot be accelerated: it has a `forward` of its own",
    lambda: base_model("llama"): "`peft_model` must be one of PEFT's .*, got LlamaForCausalLM",
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", None))
def test_what_cannot_be_accelerated_is_refused_and_unchanged(make: Any, reason: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(TypeError, match=reason) as raised:
        spf.accelerate(model)
    assert "\n" not in str(raised.value)
    assert snapshot(model) == before


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`compat` must be one of correct, exact, got 'peft'"):
        spf.accelerate(peft_model(), compat="peft")
    with pytest.raises(TypeError, match="`peft_model` must be an accelerated model, got PeftModelForCausalLM"):
        spf.restore(peft_model())


EXACT = [
    ("llama", "CausalLM", "PromptTuning", "left"),
    ("llama", "CausalLM", "PrefixTuning", "left"),
    ("t5", "Seq2SeqLM", "PromptTuning", "left"),
    ("llama", "SequenceClassification", "PromptTuning", "left"),
    ("llama", "SequenceClassification", "PromptTuning", "right"),
    ("bert", "SequenceClassification", "PromptTuning", "left"),
    ("bert", "QuestionAnswering", "PromptTuning", "full"),
]


@pytest.mark.parametrize(("name", "head", "kind", "padding"), EXACT)
def test_exact_is_peft_where_the_two_differ(name: str, head: str, kind: str, padding: str) -> None:
    plain, inputs = peft_model(name, head, kind).eval(), batch(padding, head)
    expected = plain(**inputs).loss
    model = spf.accelerate(plain)
    assert abs(model(**inputs).loss - expected) > 1e-4
    spf.accelerate(model, compat="exact")
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=0, atol=0)


def test_exact_runs_other_batches_here() -> None:
    model = spf.accelerate(peft_model().eval(), compat="exact")
    with counted(model) as widths:
        model(**batch("right"))
        assert widths[-1] == VIRTUAL + sum(LENGTHS)
        model(**batch("left"))
        assert widths[-1] == (VIRTUAL + IDS.shape[1]) * len(IDS)


def test_exact_fails_as_peft_does_with_labels_of_tokens() -> None:
    inputs = batch("full", "TokenClassification")
    model = spf.accelerate(peft_model("bert", "TokenClassification"))
    assert model(**inputs).loss.isfinite()
    spf.accelerate(model, compat="exact")
    with pytest.raises(ValueError, match="Expected input batch_size"):
        model(**inputs)


def test_what_peft_must_run_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = spf.accelerate(peft_model().eval())
    with caplog.at_level(logging.WARNING, "softprompt_fast"), torch.no_grad():
        for _ in range(2):
            model(IDS, use_cache=True)
    assert [record.getMessage() for record in caplog.records] == [
        "PEFT runs PeftModelForCausalLM itself: `use_cache` asks for a cache in PEFT's layout"
    ]


@pytest.mark.parametrize("first", ["forward", "generate"])
def test_peft_runs_prefixes_that_the_first_batch_shows_to_be_wrong_here(
    first: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = peft_model(kind="PrefixTuning").eval()
    inputs = batch("right")
    expected, tokens = model(**inputs).loss, model.generate(IDS, max_new_tokens=2)
    spf.accelerate(model)
    monkeypatch.setattr("softprompt_fast.packed.runner.compare_with_rows_alone", lambda *args: 1.0)
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        for call in (first, "forward", "generate"):
            if call == "forward":
                torch.testing.assert_close(model(**inputs).loss, expected, rtol=0, atol=0)
            else:
                assert torch.equal(model.generate(IDS, max_new_tokens=2), tokens)
    assert len(caplog.records) == 1
    assert "packed logits differ" in caplog.text


def test_token_types_are_ignored_as_by_peft() -> None:
    for kind in ("PromptTuning", "PrefixTuning"):
        model = spf.accelerate(peft_model("gpt2", kind=kind).eval())
        expected = model(**batch("right")).loss
        with pytest.warns(UserWarning, match="Token type ids are not supported"):
            got = model(**batch("right"), token_type_ids=torch.ones_like(IDS)).loss
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
