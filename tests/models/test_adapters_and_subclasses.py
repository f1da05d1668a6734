"""PEFT models, subclasses and models without a head: shared execution where it is exact, else the true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from support.rows_alone import ROWS, alone, relative
from support.tiny_models import LLAMA, batch, build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank

peft = pytest.importorskip("peft")


def lora(model: Any) -> Any:
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    return wrapped.eval()


def with_prompts(model: Any, **options: Any) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(model, **options)
    for prompt, length in {"short": 2, "long": 7}.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32))
    return tuned


def test_adapters_in_the_base_run_shared_and_get_gradients() -> None:
    tuned = with_prompts(lora(build("llama")))
    trained = [p for name, p in tuned.base_model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    ids, mask = batch()
    output = tuned(ids, mask, labels=ids, prompt_ids=ROWS, return_logits=True)
    assert tuned.execution_report().execution == "shared"
    padded = spf.SoftPromptModel(tuned.base_model, tuned.prompts, execution="padded")
    for parameter in trained:
        parameter.requires_grad_(True)
    expected = padded(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        row_alone, used = alone(tuned, ids[row][real], prompt)
        assert relative(output.logits[row][real], row_alone.logits[0, len(used) :]) < 1e-5
    everything = [*trained, *tuned.prompts.parameters()]
    for a, b in zip(
        torch.autograd.grad(output.loss, everything), torch.autograd.grad(expected.loss, everything), strict=True
    ):
        assert relative(a, b) < 1e-4
    assert {key.split(".")[0] for key in tuned.state_dict()} == {"prompts", "base_model"}
    assert all("lora_" in key or key.startswith("prompts.") for key in tuned.state_dict())


def test_a_bank_over_adapters() -> None:
    model = lora(build("llama"))
    bank = PromptBank(model)
    bank.add("p", torch.randn(4, 32))
    bank.compile()
    assert bank.compiled == ["p"] and bank.uncompiled is None


def test_an_adapter_and_its_base_can_both_be_wrapped() -> None:
    base = build("llama")
    wrapped = lora(base)
    a, b = with_prompts(wrapped), with_prompts(wrapped.get_base_model())
    ids, mask = batch()
    expected = [m(ids, mask, prompt_ids=ROWS).logits for m in (a, b)]
    a.unload()
    del a
    assert torch.equal(b(ids, mask, prompt_ids=ROWS).logits, expected[1])


def test_prompts_of_peft_in_the_base_are_the_reason() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    report = spf.SoftPromptModel(peft.get_peft_model(build("llama"), config)).execution_report()
    assert (report.execution, "it has a prompt of PEFT" in report.reason) == ("padded", True)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_a_base_with_an_input_prompt_of_peft_is_refused(kind: Any) -> None:
    base = build("llama")
    spf.SoftPromptModel(base)  # the model itself was checked before
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match=r"PeftModelForCausalLM cannot use a prompt: it has one of its own, 'default'"):
        spf.SoftPromptModel(model)
    spf.SoftPromptModel(model.get_base_model())


def test_an_encoder_decoder_with_a_prompt_of_peft_in_its_encoder_has_another_one() -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    base = build("t5")
    model = peft.get_peft_model(base, config).eval()
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("a", 2)
    ids = torch.tensor([[5, 6, 7]])
    start = torch.tensor([[0]])
    own, added = model.get_prompt(1).detach(), tuned.prompts["a"].detach()[None]
    vectors = torch.cat([own, added, base.get_input_embeddings()(ids)], 1)
    expected = base(inputs_embeds=vectors, decoder_input_ids=start).logits
    found = tuned(ids, torch.ones_like(ids), prompt_ids="a", decoder_input_ids=start).logits
    torch.testing.assert_close(found, expected)


def test_a_subclass_runs_like_its_class() -> None:
    class MyModel(tf.LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    tuned = with_prompts(MyModel(tf.LlamaConfig(**LLAMA)).eval())
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    assert tuned.execution_report().execution == "shared"
    expected, used = alone(tuned, ids[0], ROWS[0])
    assert relative(logits[0], expected.logits[0, len(used) :]) < 1e-5


def test_a_subclass_of_a_classifier_reads_the_last_token() -> None:
    class MyClassifier(tf.LlamaForSequenceClassification):
        pass

    torch.manual_seed(0)
    tuned = with_prompts(MyClassifier(tf.LlamaConfig(**LLAMA, num_labels=3)).eval())
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    for row, prompt in enumerate(ROWS):
        expected, _ = alone(tuned, ids[row][mask[row].bool()], prompt)
        assert relative(logits[row], expected.logits[0]) < 1e-5


def test_models_without_a_head_say_so() -> None:
    tuned = with_prompts(tf.LlamaModel(tf.LlamaConfig(**LLAMA)).eval())
    assert tuned.execution_report().reason == "LlamaModel has no language-modelling head"
    ids, mask = batch()
    assert tuned(ids, mask, prompt_ids=ROWS)[0].isfinite().all()
