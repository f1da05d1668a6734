"""What callers pass to ``generate`` beside ids and options: right as for the row alone, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.real_tokens import GREEDY, ROWS, prompt_tokens, with_real_prompts
from support.serving import tiny_tokenizer
from support.tiny_models import build
from torch import Tensor

from softprompt_fast.inference import PromptBank, SoftPromptPipeline

ONE = GREEDY | {"num_beams": 1}


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(6, 90, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:], mask[3, 1:] = 0, 0, 0
    return ids, mask


def with_types(name: str) -> Any:
    """GPT-2 adds the vector of a token for each type; BERT has a table of types, and type 0 if none are given."""
    if name == "gpt2":
        return build("gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = tf.BertLMHeadModel(tf.BertConfig(**sizes, num_attention_heads=4, is_decoder=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_token_types_have_their_effect(name: str, use_cache: bool) -> None:
    model = with_types(name)
    tuned = with_real_prompts(model)
    ids, mask = rows()
    options = GREEDY | {"use_cache": use_cache}
    for types in (torch.zeros_like(ids), torch.ones_like(ids), ids % 2):
        found = tuned.generate(ids, mask, ROWS, token_type_ids=types, **options)
        for row, prompt in enumerate(ROWS):
            real = mask[row] == 1
            before = prompt_tokens()[prompt] if prompt else ids[0, :0]
            text, own = torch.cat([before, ids[row][real]]), torch.cat([before * 0, types[row][real]])
            alone = model.generate(text[None], token_type_ids=own[None], **options)[0, len(text) :]
            assert torch.equal(found[row, 9:], alone), (row, found[row, 9:], alone)
    with pytest.raises(ValueError, match=r"`token_type_ids` must have the shape of input_ids \[4, 9\], got \[4, 8\]"):
        tuned.generate(ids, mask, ROWS, token_type_ids=ids[:, 1:], **options)


def test_deep_prompts_refuse_token_types_that_have_an_effect() -> None:
    tuned = deep_model("gpt2")
    ids, mask = rows()
    with pytest.raises(ValueError, match="`token_type_ids`=Tensor cannot be combined with soft prompts"):
        tuned.generate(ids, mask, "long", token_type_ids=ids * 0)
    other = deep_model("llama")  # has no types
    expected = other.generate(ids, mask, "long", **GREEDY)
    assert torch.equal(other.generate(ids, mask, "long", token_type_ids=ids * 0 + 1, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_ids_that_are_no_tensor_of_integers(name: str) -> None:
    tuned = with_real_prompts(build(name))
    ids, mask = rows()
    batch = tf.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(tuned.generate(**batch, prompt_ids=ROWS, **ONE), tuned.generate(ids, mask, ROWS, **ONE))
    for given, words in ((batch, r"BatchEncoding; pass a mapping as keywords, `\*\*batch`"), (ids.tolist(), "list")):
        with pytest.raises(TypeError, match=rf"`input_ids` must be a tensor \[B, T\], got {words}$"):
            tuned.generate(given, prompt_ids=ROWS, **ONE)
    with pytest.raises(TypeError, match="`input_ids` must be int64 or int32, got float32"):
        tuned.generate(ids.float(), mask, ROWS, **ONE)
    with pytest.raises(TypeError, match="`generation_config` must be a GenerationConfig, got dict"):
        tuned.generate(ids, mask, ROWS, generation_config={"max_new_tokens": 3})


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_a_row_must_begin_with_something(name: str) -> None:
    tuned = with_real_prompts(build(name))
    ids, mask = rows()
    mask[2] = 0
    with pytest.raises(ValueError, match="must hold a token in each row without a prompt, got none in row 2"):
        tuned.generate(ids, mask, [None] * 4, **ONE)
    with pytest.raises(ValueError, match="must hold a token in each row without a prompt, got none in row 0"):
        tuned.generate(ids[:, :0], prompt_ids=[None] * 4, **ONE)
    assert len(tuned.generate(ids[:, :0], prompt_ids="long", **ONE)) == 4
    assert len(tuned.generate(ids[:0], prompt_ids=[], **ONE)) == 0


def test_an_assistant_is_another_model_of_transformers() -> None:
    ids, mask = rows()
    for name in ("llama", "bloom"):
        tuned = with_real_prompts(build(name))
        with pytest.raises(TypeError, match="`assistant_model` must be a model of transformers, got SoftPromptModel"):
            tuned.generate(ids[:1], mask[:1], "long", assistant_model=tuned, **GREEDY)
        expected = tuned.generate(ids[:1], mask[:1], "long", **GREEDY)
        assert torch.equal(tuned.generate(ids[:1], mask[:1], "long", assistant_model=build(name), **GREEDY), expected)
        if name == "llama":  # prompts are in the cache, so the model may assist itself
            itself = tuned.generate(ids[:1], mask[:1], "long", assistant_model=tuned.base_model, **GREEDY)
            assert torch.equal(itself, expected)
        else:
            with pytest.raises(ValueError, match="`assistant_model` cannot be the same BloomForCausalLM"):
                tuned.generate(ids[:1], mask[:1], "long", assistant_model=tuned.base_model, **GREEDY)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_encoder_decoders_take_and_refuse(name: str) -> None:
    model = build(name)
    model.generation_config.eos_token_id = None
    tuned = with_real_prompts(model)
    ids, mask = rows()
    begin = ids[:, :3]
    found = tuned.generate(ids, mask, ROWS, decoder_input_ids=begin, **ONE)
    for row, prompt in enumerate(ROWS):
        text = ids[row][mask[row] == 1]
        whole = text if prompt is None else torch.cat([prompt_tokens()[prompt], text])
        alone = model.generate(whole[None], decoder_input_ids=begin[row : row + 1], **ONE)
        assert torch.equal(found[row], alone[0])
    states = model.get_encoder()(ids)
    for options in ({"encoder_outputs": states}, {"decoder_inputs_embeds": torch.zeros(4, 3, 32)}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` cannot be given"):
            tuned.generate(ids, mask, ROWS, **options, **ONE)
    with pytest.raises(ValueError, match="`encoder_outputs` cannot be given: the encoder runs with the prompts"):
        tuned(ids, mask, prompt_ids=ROWS, encoder_outputs=states, decoder_input_ids=begin)
    with pytest.raises(ValueError, match="`labels` or `decoder_input_ids` must be given"):
        tuned(ids, mask, prompt_ids=ROWS)
    with pytest.raises(ValueError, match="`prefill_chunk_size`=4 cannot be combined with soft prompts"):
        tuned.generate(ids, mask, ROWS, prefill_chunk_size=4, **ONE)
    with pytest.raises(ValueError, match=r"`assistant_model`=[A-Za-z0-9]+ cannot be combined with soft prompts$"):
        tuned.generate(ids, mask, ROWS, assistant_model=model, **ONE)


def test_a_pipeline_reads_a_generation_configuration() -> None:
    model = build("llama")
    model.generation_config.pad_token_id = None
    bank = PromptBank(model)
    bank.add("p", torch.randn(7, 32))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "awful"
    pipe = SoftPromptPipeline(bank, tokenizer)
    texts = ["fine film", "film plot no yes great"]
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = pipe.generate(texts, "p", **options)
    assert [len(answer["texts"]) for answer in expected] == [2, 2]
    assert pipe.generate(texts, "p", generation_config=tf.GenerationConfig(**options)) == expected
