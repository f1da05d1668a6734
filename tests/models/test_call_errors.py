"""A call that fails changes nothing for the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_alone, deep_model
from support.rows_alone import ROWS, relative, tuned_model
from support.tiny_models import GPT2, batch

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank


def fails(*args: Any) -> Any:
    raise ArithmeticError("of the caller")


BAD_CALLS: dict[str, dict[str, Any]] = {
    "loss": {"labels": torch.ones(4, 11, dtype=torch.int64), "loss_function": fails},
    "labels": {"labels": torch.ones(4, 3, dtype=torch.int64)},
    "mask": {"attention_mask": torch.ones(4, 3)},
    "prompt": {"prompt_ids": ["none such"] * 4},
    "counts": {"lengths": [1, 2]},
    "columns": {"logits_to_keep": torch.tensor([99])},
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("kind", ["plain", "deep", "padded"])
def test_an_error_in_the_first_batch_changes_nothing(call: str, kind: str) -> None:
    tuned = deep_model("llama") if kind == "deep" else tuned_model("bloom" if kind == "padded" else "llama")
    ids, mask = batch()
    arguments = {"input_ids": ids, "attention_mask": mask, "prompt_ids": ROWS} | BAD_CALLS[call]
    if kind == "padded" and call == "counts":
        pytest.skip("the padded layout needs no counts")
    with pytest.raises((ValueError, KeyError, ArithmeticError)):
        tuned(**arguments)
    before = tuned.execution_report()
    assert before.execution == ("padded" if kind == "padded" else "shared")
    assert tuned(ids, mask, prompt_ids=ROWS).logits.isfinite().all()
    assert tuned.execution_report().execution == before.execution


@pytest.mark.parametrize("kind", ["plain", "deep"])
def test_a_model_that_fails_on_packed_batches_is_found_out(kind: str) -> None:
    tuned = deep_model("llama") if kind == "deep" else tuned_model("llama")
    model, forward = tuned.base_model.model, tuned.base_model.model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            raise ArithmeticError("no packed batches here")
        return forward(*args, **kwargs)

    model.forward = failing
    ids, mask = batch()
    if kind == "deep":
        with pytest.raises(TypeError, match="cannot run deep prompts: the packed layout failed: ArithmeticError"):
            tuned(ids, mask, prompt_ids=ROWS)
        assert tuned.execution_report().execution == "refused"
    else:
        assert tuned(ids, mask, prompt_ids=ROWS).logits.isfinite().all()
        assert "the packed layout failed: ArithmeticError" in tuned.execution_report().reason


def test_after_a_batch_that_worked_an_error_is_the_callers() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    tuned(ids, mask, prompt_ids=ROWS)
    with pytest.raises(ArithmeticError):
        tuned(ids, mask, labels=ids, prompt_ids=ROWS, loss_function=fails)
    assert tuned.execution_report().execution == "shared"


def short_gpt2(positions: int = 12) -> Any:
    config = tf.GPT2Config(**GPT2 | {"n_positions": positions})
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(config).eval()


TOO_LONG = r"must fit the model's 12 positions together with the prompt: got 9 tokens after 5 virtual tokens in row 1"


@pytest.mark.parametrize("kind", [spf.SoftPromptModel, spf.DeepPromptModel])
@pytest.mark.parametrize("entry", ["forward", "next_token_logits", "logits_at"])
def test_rows_longer_than_the_model(kind: Any, entry: str) -> None:
    tuned = kind(short_gpt2())
    tuned.add_prompt("p", 5, init="vocabulary", seed=1)
    ids = torch.randint(3, 90, (2, 9))
    calls = {
        "forward": lambda ids: tuned(ids, prompt_ids=[None, "p"]),
        "next_token_logits": lambda ids: tuned.next_token_logits(ids, prompt_ids=[None, "p"]),
        "logits_at": lambda ids: tuned.logits_at(ids, None, [None, "p"], torch.tensor([[0, 1]])),
    }
    with pytest.raises(ValueError, match=TOO_LONG):
        calls[entry](ids)
    assert calls[entry](ids[:, :7]) is not None
    assert tuned.execution_report().execution == "shared"


def test_prompts_longer_than_the_model_are_not_compiled() -> None:
    bank = PromptBank(short_gpt2())
    bank.add("p", torch.randn(13, 32))
    with pytest.raises(ValueError, match="got 0 tokens after 13 virtual tokens in row 0"):
        bank.compile()
    bank.add("q", torch.randn(5, 32))
    bank.compile(["q"])
    assert bank.compiled == ["q"] and bank.uncompiled is None


ENCODERS: dict[str, Any] = {
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=12)
    ),
    "roberta": lambda: tf.RobertaForMaskedLM(
        tf.RobertaConfig(vocab_size=96, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=14, pad_token_id=1)
    ),
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
                      max_position_embeddings=12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_longer_than_an_encoder(name: str) -> None:
    tuned = spf.SoftPromptModel(ENCODERS[name]().eval())
    tuned.add_prompt("p", 5, init="vocabulary", seed=1)
    more = {"decoder_input_ids": torch.ones(2, 2, dtype=torch.int64)} if name == "bart" else {}
    ids = torch.randint(3, 90, (2, 9))
    with pytest.raises(ValueError, match=TOO_LONG):
        tuned(ids, prompt_ids=[None, "p"], **more)
    assert tuned(ids[:, :7], prompt_ids=[None, "p"], **more).logits is not None


def test_a_t5_has_no_limit() -> None:
    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=4, n_positions=4)
    tuned = spf.SoftPromptModel(tf.T5ForConditionalGeneration(config).eval())
    tuned.add_prompt("p", 5, init="vocabulary", seed=1)
    ids = torch.randint(3, 90, (2, 9))
    assert tuned(ids, decoder_input_ids=ids[:, :2], prompt_ids="p").logits.isfinite().all()


@pytest.mark.parametrize("execution", ["shared", "padded"])
def test_rows_that_fit_though_the_longest_prompt_and_text_together_do_not(execution: str) -> None:
    model = short_gpt2()
    tuned = spf.SoftPromptModel(model, execution=execution)
    tuned.add_prompt("p", 5, init="vocabulary", seed=1)
    ids = torch.randint(3, 90, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    logits = tuned(ids, mask, prompt_ids=[None, "p"]).logits
    assert relative(logits[0], model(ids[:1]).logits[0]) < 1e-5
    alone = tuned(ids[1:, :4], prompt_ids="p").logits
    assert relative(logits[1, :4], alone[0]) < 1e-5 and not logits[1, 4:].any()
    assert relative(tuned.next_token_logits(ids, mask, [None, "p"])[1], alone[0, -1]) < 1e-5


def test_a_stray_keyword_leaves_deep_prompts_as_they_are() -> None:
    tuned = deep_model("llama")
    ids, mask = batch()
    tuned(ids, mask, prompt_ids=ROWS, token_type_ids=ids * 0, novelty=1)
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    expected = deep_alone(tuned, ids[0][mask[0].bool()], tuned.prompts["long"])
    assert relative(logits[0][mask[0].bool()], expected) < 1e-5
    with pytest.raises(ValueError, match="`output_attentions` cannot be given: deep prompts run in the packed layout"):
        tuned(ids, mask, prompt_ids=ROWS, output_attentions=True)
