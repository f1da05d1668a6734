"""Every form of a call that tokenizers, transformers and PEFT know gives the right result, or one clear error."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_alone, deep_model
from support.rows_alone import ROWS, alone, relative, tuned_model
from support.tiny_models import BERT, batch, build

import softprompt_fast as spf


@pytest.mark.parametrize("through", ["argument", "configuration"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_tuples_are_aligned_too(name: str, through: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    more: dict[str, Any] = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    expected = tuned(ids, mask, prompt_ids=ROWS, output_hidden_states=True, **more)
    if through == "configuration":
        tuned.config.return_dict = False
    else:
        more["return_dict"] = False
    got = tuned(ids, mask, prompt_ids=ROWS, output_hidden_states=True, **more)
    assert type(got) is tuple and torch.equal(got[0], expected.logits) and torch.equal(expected[0], got[0])
    assert len(got) == len(expected.to_tuple())
    labels = ids[:, :3].contiguous() if name == "t5" else ids
    loss = tuned(ids, mask, labels=labels, prompt_ids=ROWS, return_dict=False)[0]
    whole = tuned(ids, mask, labels=labels, prompt_ids=ROWS, return_dict=True, return_logits=True)
    assert loss.dim() == 0 and torch.equal(loss, whole.loss) and torch.equal(whole[0], loss)
    if through == "configuration":
        assert tuned.config.return_dict is False
        if tuned._traits.causal:
            assert tuned.next_token_logits(ids, mask, ROWS).shape == (4, 96)


TOKENIZER_OUTPUT = ("special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")


@pytest.mark.parametrize("name", ["llama", "bloom", "bert", "roberta", "electra", "t5"])
def test_the_whole_output_of_a_tokenizer(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    more: dict[str, Any] = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    expected = tuned(ids, mask, prompt_ids=ROWS, **more).logits
    before = tuned.execution_report().execution
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        extra = dict.fromkeys(TOKENIZER_OUTPUT, ids) | {"token_type_ids": ids * 0}
        got = tuned(ids, mask, prompt_ids=ROWS, **extra, **more).logits
    assert torch.equal(got, expected) and not caplog.records
    assert tuned.execution_report().execution == before


def test_an_unknown_keyword_is_dropped_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        first, second = (tuned(ids, mask, prompt_ids=ROWS, novelty=3, is_causal=False).logits for _ in range(2))
    lines = sorted(record.getMessage() for record in caplog.records)
    assert lines == [f"`{key}` is dropped: the model's forward does not take it" for key in ("is_causal", "novelty")]
    assert torch.equal(first, second) and torch.equal(first, tuned(ids, mask, prompt_ids=ROWS).logits)
    assert tuned.execution_report().execution == "shared"


def model_with_types(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        return build("gpt2")
    classes = {
        "bert": (tf.BertConfig, tf.BertForMaskedLM),
        "xlnet": (tf.XLNetConfig, tf.XLNetLMHeadModel),
        "deberta": (tf.DebertaV2Config, tf.DebertaV2ForMaskedLM),
        "albert": (tf.AlbertConfig, tf.AlbertForMaskedLM),
    }
    config, model = classes[name]
    sizes: dict[str, Any] = dict(BERT) | {"type_vocab_size": 3}
    if name == "xlnet":
        sizes = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "attn_type": "bi"}
    if name == "albert":
        sizes["embedding_size"] = 32
    return model(config(**sizes)).eval()


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "deberta", "albert", "xlnet"])
def test_token_types_follow_their_tokens(name: str, layout: str) -> None:
    model = model_with_types(name)
    tuned = spf.SoftPromptModel(model, execution=layout)
    for prompt, length in {"short": 2, "long": 7}.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32))
    ids, mask = batch()
    ids[:, :5] = torch.arange(5, 10)  # shared text whose types differ
    mask[:, :5] = 1
    types = torch.randint(0, 2, ids.shape)
    logits = tuned(ids, mask, prompt_ids=ROWS, token_type_ids=types).logits
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        count = 0 if prompt is None else len(tuned.prompts[prompt])
        widened = torch.cat([torch.zeros(count, dtype=torch.int64), types[row][real]])[None]
        expected, used = alone(tuned, ids[row][real], prompt, token_type_ids=widened)
        assert relative(logits[row][real], expected.logits[0, len(used) :]) < 1e-5
    assert tuned.execution_report().execution == ("shared" if (name, layout) == ("gpt2", "auto") else "padded")


def test_token_types_after_deep_prompts() -> None:
    tuned = deep_model("gpt2")
    ids, mask = batch()
    plain = tuned(ids, mask, prompt_ids=ROWS).logits
    typed = tuned(ids, mask, prompt_ids=ROWS, token_type_ids=ids * 0 + 5).logits
    weight = tuned.base_model.transformer.wte.weight
    vectors = torch.nn.functional.embedding(ids, weight) + weight[5]
    assert relative(typed, plain) > 1e-2
    assert relative(typed, tuned(None, mask, prompt_ids=ROWS, inputs_embeds=vectors).logits) < 1e-5
    assert relative(plain[0], deep_alone(tuned, ids[0], tuned.prompts["long"])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma", "bloom", "bert", "t5", "bart-scaled"])
def test_vectors_instead_of_ids(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    more: dict[str, Any] = {"decoder_input_ids": ids[:, :3]} if name in ("t5", "bart-scaled") else {}
    vectors = tuned.get_input_embeddings()(ids).detach().requires_grad_()
    expected = tuned(ids, mask, prompt_ids=ROWS, **more).logits
    got = tuned(inputs_embeds=vectors, attention_mask=mask, prompt_ids=ROWS, **more).logits
    assert relative(got, expected) < 1e-5
    got.square().sum().backward()
    if name in ("t5", "bart-scaled"):
        assert vectors.grad[mask.bool()].abs().amax(1).min() > 0
        return
    for row, prompt in enumerate(ROWS):  # the oracle: each row alone
        real = mask[row].bool()
        own = vectors[row][real].detach().requires_grad_()
        prefix = torch.zeros(0, 32) if prompt is None else tuned.prompts[prompt].detach()
        logits = tuned.base_model(inputs_embeds=torch.cat([prefix, own])[None]).logits[0, len(prefix) :]
        logits.square().sum().backward()
        assert relative(vectors.grad[row][real], own.grad) < 1e-4
    assert not vectors.grad[mask == 0].any()


def test_vectors_after_deep_prompts() -> None:
    tuned = deep_model("llama")
    ids, mask = batch()
    vectors = tuned.get_input_embeddings()(ids)
    got = tuned(attention_mask=mask, prompt_ids=ROWS, inputs_embeds=vectors).logits
    assert relative(got, tuned(ids, mask, prompt_ids=ROWS).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
def test_logits_to_keep_counts_the_columns_of_the_input(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    assert torch.equal(tuned(ids, mask, prompt_ids=ROWS, logits_to_keep=3).logits, logits[:, -3:])
    columns = torch.tensor([0, 4, 9])
    assert torch.equal(tuned(ids, mask, prompt_ids=ROWS, logits_to_keep=columns).logits, logits[:, columns])
    assert torch.equal(tuned(ids, mask, prompt_ids=ROWS, logits_to_keep=0).logits, logits)


def test_attentions_of_an_eager_model_hold_the_prompts_slots() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    expected = tuned(ids, mask, prompt_ids=ROWS).logits
    tuned.base_model.set_attn_implementation("eager")
    output = tuned(ids, mask, prompt_ids=ROWS, output_attentions=True)
    assert [tuple(a.shape) for a in output.attentions] == [(4, 4, 18, 18)] * 3
    assert relative(output.logits, expected) < 1e-5
    last = 7 + int(mask[3].sum()) - 1  # the last token of a row: it sees its prompt and its text
    assert relative(output.attentions[0][3, :, last, : last + 1].sum(-1), torch.ones(4)) < 1e-5
    assert tuned(ids, mask, prompt_ids=ROWS).logits is not None
    assert tuned.execution_report().execution == "shared"


def test_attentions_that_the_configuration_asks_for() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("p", 5, seed=0)
    ids, mask = batch()
    assert tuned(ids, mask, prompt_ids="p").attentions[0].shape == (4, 4, 16, 16)
    assert tuned(ids, mask, prompt_ids="p", output_attentions=False).attentions is None


@pytest.mark.parametrize("entry", ["forward", "next_token_logits"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"input_ids": torch.ones(5).long()}, ValueError, r"`input_ids` must have shape \[B, T\], got \[5\]"),
        ({"input_ids": [[1, 2]]}, TypeError, r"`input_ids` must be a tensor \[B, T\], got list"),
        ({"attention_mask": torch.ones(11)}, ValueError, r"`attention_mask` must have the shape of input_ids \[4"),
        ({"attention_mask": [[1]]}, TypeError, "`attention_mask` must be a tensor or None, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_wrong_shapes_are_named(name: str, entry: str, wrong: dict[str, Any], error: Any, message: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    arguments = {"input_ids": ids, "attention_mask": mask, "prompt_ids": ROWS} | wrong
    with pytest.raises(error, match=message):
        tuned(**arguments) if entry == "forward" else tuned.next_token_logits(**arguments)


@pytest.mark.parametrize("name", ["llama", "bloom", "bert", "t5"])
def test_wrong_labels_and_vectors_are_named(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    with pytest.raises(ValueError, match="`labels` must"):
        tuned(ids, mask, labels=torch.ones(3, 3, dtype=torch.int64), prompt_ids=ROWS)
    with pytest.raises(ValueError, match=r"give `input_ids` or `inputs_embeds`, got both"):
        tuned(ids, mask, prompt_ids=ROWS, inputs_embeds=torch.randn(4, 11, 32))
    with pytest.raises(ValueError, match=r"give `input_ids` or `inputs_embeds`, got neither"):
        tuned(attention_mask=mask, prompt_ids=ROWS)
    with pytest.raises(ValueError, match=r"`inputs_embeds` must have shape \[B, T, 32\], got \[4, 11, 8\]"):
        tuned(attention_mask=mask, prompt_ids=ROWS, inputs_embeds=torch.randn(4, 11, 8))
    with pytest.raises(ValueError, match="`logits_to_keep` must be at least 0, got -1"):
        tuned(ids, mask, prompt_ids=ROWS, logits_to_keep=-1)
