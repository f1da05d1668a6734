"""Every field of transformers' GenerationConfig: it works as for the row alone, is refused by name, or changes no text.

Works: the new tokens of a mixed batch equal those of each row alone. For options that do not read the text, alone means
``generate`` of the plain model on prompt and text together. For options that read ids, the oracle is a greedy loop with
transformers' processors, which see the text only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.real_tokens import GREEDY, ROWS, prompt_tokens, rows_alone, with_real_prompts
from support.serving import tiny_tokenizer
from support.tiny_models import build
from torch import Tensor
from transformers.generation import logits_process as lp

import softprompt_fast as spf
from softprompt_fast.hf import generation_options
from softprompt_fast.inference import PromptBank, SoftPromptPipeline

EOS = torch.tensor([2])
Processors = Callable[[Tensor], list[Any]]

PLAIN: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 9},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(3, 60))},
    "do_sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.5},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "early_stopping": {"num_beams": 2, "early_stopping": True, "eos_token_id": [7, 20, 33]},
    "length_penalty": {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": [7, 20, 33]},
    "renormalize_logits": {"renormalize_logits": True, "num_beams": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "suppress_tokens": {"suppress_tokens": list(range(10, 50))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(10, 50))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.5), "eos_token_id": 7},
    "eos_token_id": {"eos_token_id": [7, 20, 33, 50]},
    "pad_token_id": {"pad_token_id": 5, "eos_token_id": list(range(3, 60))},
    "watermarking_config": {"watermarking_config": tf.WatermarkingConfig(bias=4.0)},
}
READS_TEXT: dict[str, tuple[dict[str, Any], Processors]] = {
    "repetition_penalty": (
        {"repetition_penalty": 3.0},
        lambda text: [lp.RepetitionPenaltyLogitsProcessor(3.0)],
    ),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 3.0},
        lambda text: [lp.EncoderRepetitionPenaltyLogitsProcessor(3.0, text)],
    ),
    "no_repeat_ngram_size": (
        {"no_repeat_ngram_size": 2},
        lambda text: [lp.NoRepeatNGramLogitsProcessor(2)],
    ),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1},
        lambda text: [lp.EncoderNoRepeatNGramLogitsProcessor(1, text)],
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[n] for n in range(10, 50)]},
        lambda text: [lp.NoBadWordsLogitsProcessor([[n] for n in range(10, 50)], None)],
    ),
    "sequence_bias": (
        {"sequence_bias": [[[n], 5.0] for n in range(10, 50)]},
        lambda text: [lp.SequenceBiasLogitsProcessor([[[n], 5.0] for n in range(10, 50)])],
    ),
    "min_length": (
        {"min_length": 11, "eos_token_id": 2, "sequence_bias": [[[2], 99.0]]},
        lambda text: [lp.SequenceBiasLogitsProcessor([[[2], 99.0]]), lp.MinLengthLogitsProcessor(11, EOS)],
    ),
    "forced_bos_token_id": (
        {"forced_bos_token_id": 8},
        lambda text: [lp.ForcedBOSTokenLogitsProcessor(8)],
    ),
    "forced_eos_token_id": (
        {"forced_eos_token_id": 8, "max_new_tokens": 6},
        lambda text: [lp.ForcedEOSTokenLogitsProcessor(text.shape[1] + 6, 8)],
    ),
    "max_length": ({"max_length": 13, "max_new_tokens": None}, lambda text: []),
}
BEGIN = 7
PADDING_MATTERS: dict[str, tuple[Any, Processors]] = {
    "no_repeat_ngram_size": (2, lambda text: [lp.NoRepeatNGramLogitsProcessor(2)]),
    "encoder_no_repeat_ngram_size": (2, lambda text: [lp.EncoderNoRepeatNGramLogitsProcessor(2, text)]),
    "bad_words_ids": ([[BEGIN] * 3], lambda text: [lp.NoBadWordsLogitsProcessor([[BEGIN] * 3], None)]),
    "sequence_bias": (
        [[[BEGIN] * 3, -99.0]],
        lambda text: [lp.SequenceBiasLogitsProcessor([[[BEGIN] * 3, -99.0]])],
    ),
}
"""Values with which a row's text would be another one if padding came before it."""
LOSSLESS: dict[str, dict[str, Any]] = {
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "use_cache": {"use_cache": False},
    "max_time": {"max_time": 1000.0},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "bos_token_id": {"bos_token_id": 4},
    "decoder_start_token_id": {"decoder_start_token_id": 4},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "disable_compile": {"disable_compile": True},
    "compile_config": {"compile_config": tf.CompileConfig()},
    "cache_config": {"cache_config": {}},
    "max_cache_len": {"max_cache_len": 64},
    "low_memory": {"low_memory": True},
    "diversity_penalty": {"diversity_penalty": 0.5},
    "continuous_batching_config": {},
    "transformers_version": {},
    "stop_strings": {},  # below
}
"""They change no text, or only the way to it."""
SPECULATIVE: dict[str, dict[str, Any]] = {
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.1},
    "assistant_lookbehind": {"assistant_lookbehind": 4},
    "target_lookbehind": {"target_lookbehind": 4},
    "speculation_type": {},
}
"""Greedy text is the same; one row at a time."""
HIDDEN_CACHE_ONLY: dict[str, dict[str, Any]] = {
    "guidance_scale": {"guidance_scale": 2.0},
    "assistant_early_exit": {"assistant_early_exit": 1},
}
"""Work after compiled prompts; refused for other models."""
REFUSED: dict[str, Any] = {
    "cache_implementation": "static",
    "token_healing": True,
    "use_mtp": True,
    "is_assistant": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": [1],
    "force_words_ids": [[5]],
    "num_beam_groups": 2,
    "assistant_ensemble_weight": 0.5,
}
TABLE = PLAIN | READS_TEXT | LOSSLESS | SPECULATIVE | HIDDEN_CACHE_ONLY | REFUSED
MODELS = ["llama", "bloom"]
"""After compiled prompts, and with the prompt's vectors in the first call."""


def case(name: str) -> tuple[Any, Any, Tensor, Tensor]:
    model = build(name)
    model.generation_config.eos_token_id = None
    torch.manual_seed(5)
    ids = torch.randint(6, 90, (4, 9))
    ids[0, 4:8] = ids[0, :4]  # something to look up
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 1:], mask[3, 7:] = 0, 0, 0
    return with_real_prompts(model), model, ids, mask


def same(got: Tensor, expected: Tensor, pad: int = 0) -> bool:
    """Equal up to padding at the end, which another row may have needed."""
    extra = got[:, expected.shape[1] :]
    return torch.equal(got[:, : expected.shape[1]], expected) and bool((extra == pad).all())


def check_rows(found: Any, ids: Tensor, expected: list[Tensor], pad: int = 0) -> None:
    sequences = found if isinstance(found, Tensor) else found.sequences
    copies = len(sequences) // len(ids)
    for row, wanted in enumerate(expected):
        got = sequences[row * copies : (row + 1) * copies, ids.shape[1] :]
        assert same(got, wanted, pad), (row, got, wanted)


def greedy_on_text(model: Any, ids: Tensor, mask: Tensor, make: Processors, options: dict[str, Any]) -> list[Tensor]:
    """New tokens of each row, one by one: the model reads prompt and text, processors and lengths the text."""
    tokens = prompt_tokens()
    found = []
    for row, real, prompt in zip(ids, mask, ROWS, strict=True):
        text = start = row[real == 1][None]
        processors = make(text)
        limit = options.get("max_length") or start.shape[1] + 6
        while text.shape[1] < limit:
            whole = text if prompt is None else torch.cat([tokens[prompt][None], text], 1)
            with torch.no_grad():
                scores = model(input_ids=whole).logits[:, -1].float()
            for processor in processors:
                scores = processor(text, scores)
            text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
            if text[0, -1] == options.get("eos_token_id"):
                break
        found.append(text[:, start.shape[1] :])
    return found


def test_every_field_has_a_verdict() -> None:
    fields = {name for name in vars(tf.GenerationConfig()) if not name.startswith("_")}
    assert fields - set(TABLE) == set()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", PLAIN)
def test_options_that_do_not_read_the_text(name: str, field: str) -> None:
    tuned, model, ids, mask = case(name)
    options = GREEDY | PLAIN[field]
    pad = options["pad_token_id"]
    if not options["do_sample"]:
        check_rows(tuned.generate(ids, mask, ROWS, **options), ids, rows_alone(model, ids, mask, ROWS, options), pad)
        return
    for row in range(len(ids)):  # a batch draws other numbers
        one, real, prompt = ids[row : row + 1], mask[row : row + 1], ROWS[row : row + 1]
        tuned.generate(one, real, prompt, **options)  # checks draw no numbers, but run once
        torch.manual_seed(row)
        got = tuned.generate(one, real, prompt, **options)
        torch.manual_seed(row)
        check_rows(got, one, rows_alone(model, one, real, prompt, options), pad)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", READS_TEXT)
@pytest.mark.parametrize("by_config", [False, True])
def test_options_that_read_the_text(name: str, field: str, by_config: bool) -> None:
    tuned, model, ids, mask = case(name)
    changes, make = READS_TEXT[field]
    options = {k: v for k, v in (GREEDY | changes).items() if v is not None}
    expected = greedy_on_text(model, ids, mask, make, options)
    given = {"generation_config": tf.GenerationConfig(**options)} if by_config else options
    check_rows(tuned.generate(ids, mask, ROWS, **given), ids, expected)
    if field == "max_length":  # the model's own counts too
        model.generation_config.max_length = 13
        check_rows(tuned.generate(ids, mask, ROWS, do_sample=False, pad_token_id=0), ids, expected)


@pytest.mark.parametrize("field", PADDING_MATTERS)
def test_rows_of_several_lengths_are_not_padded_where_padding_counts(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The padding of a row would hold the token with which it begins, here also the one with which it ends."""
    tuned, model, ids, mask = case("llama")
    ids[mask.cumsum(1) == 1] = BEGIN
    ids[(mask.cumsum(1) == mask.sum(1, keepdim=True)) & (mask == 1)] = BEGIN
    value, make = PADDING_MATTERS[field]
    others = [token for token in range(96) if token not in (BEGIN, BEGIN + 1)]
    processors = lambda text: [lp.SuppressTokensLogitsProcessor(others), *make(text)]  # noqa: E731
    options: dict[str, Any] = GREEDY | {"suppress_tokens": others, field: value}
    expected = greedy_on_text(model, ids, mask, processors, options)
    check_rows(tuned.generate(ids, mask, ROWS, **options), ids, expected)
    monkeypatch.setattr(
        generation_options, "INDEPENDENT_OF_PADDING", generation_options.INDEPENDENT_OF_PADDING | {field}
    )
    with pytest.raises(AssertionError):
        check_rows(tuned.generate(ids, mask, ROWS, **options), ids, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", LOSSLESS)
def test_options_without_an_effect_on_text(name: str, field: str) -> None:
    tuned, model, ids, mask = case(name)
    found = tuned.generate(ids, mask, ROWS, **GREEDY | LOSSLESS[field])
    check_rows(found, ids, rows_alone(model, ids, mask, ROWS, GREEDY))
    if field == "output_scores":
        assert found.scores[0].shape == (4, 96)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", SPECULATIVE)
def test_speculative_decoding_changes_no_text(name: str, field: str) -> None:
    tuned, model, ids, mask = case(name)
    options: dict[str, Any] = GREEDY | {"max_new_tokens": 12} | SPECULATIVE[field]
    if "prompt_lookup_num_tokens" not in options:
        options["assistant_model"] = build("gpt2")
        assistant = {k: options.pop(k) for k in SPECULATIVE[field]}
        options["assistant_model"].generation_config.update(**assistant)
    for row in range(len(ids)):
        one, real, prompt = ids[row : row + 1], mask[row : row + 1], ROWS[row : row + 1]
        expected = rows_alone(model, one, real, prompt, GREEDY | {"max_new_tokens": 12})
        check_rows(tuned.generate(one, real, prompt, **options), one, expected)


@pytest.mark.parametrize("field", HIDDEN_CACHE_ONLY)
def test_options_that_need_compiled_prompts(field: str) -> None:
    options = GREEDY | HIDDEN_CACHE_ONLY[field]
    tuned, model, ids, mask = case("llama")
    for row in range(len(ids)):
        one, real, prompt = ids[row : row + 1], mask[row : row + 1], ROWS[row : row + 1]
        check_rows(tuned.generate(one, real, prompt, **options), one, rows_alone(model, one, real, prompt, options))
    tuned, model, ids, mask = case("bloom")
    with pytest.raises(ValueError, match=f"`{field}`=.* cannot be combined with soft prompts"):
        tuned.generate(ids, mask, ROWS, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", REFUSED)
def test_options_that_are_refused_by_name(name: str, field: str) -> None:
    tuned, _, ids, mask = case(name)
    with pytest.raises(ValueError, match=f"`{field}`=.* cannot be combined with soft prompts"):
        tuned.generate(ids, mask, ROWS, **GREEDY | {field: REFUSED[field]})
    with pytest.raises(ValueError, match=f"`{field}`=.* cannot be combined with soft prompts"):
        tuned.generate(ids, mask, ROWS, generation_config=tf.GenerationConfig(**GREEDY, **{field: REFUSED[field]}))


class _Messages(logging.Handler):
    """What transformers logs and warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.mark.parametrize("kind", ["llama", "bloom", "t5", "deep", "pipeline"])
def test_transformers_has_nothing_to_warn_of(kind: str) -> None:
    model = build("llama" if kind in ("deep", "pipeline") else kind)
    config = tf.GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation="dynamic")
    handler, logger = _Messages(), logging.getLogger("transformers")
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if kind == "pipeline":
                tokenizer = tiny_tokenizer()
                tokenizer.eos_token = "film"
                bank = PromptBank(model)
                bank.add("long", torch.randn(7, 32))
                SoftPromptPipeline(bank, tokenizer).generate(["yes no"], "long", generation_config=config)
            else:
                tuned = with_real_prompts(model, spf.DeepPromptModel) if kind == "deep" else with_real_prompts(model)
                tuned.generate(torch.full((2, 5), 7), None, "long", generation_config=config)
    finally:
        logger.removeHandler(handler)
    assert handler.found + [str(each.message) for each in warned] == []
    assert config.cache_implementation == "dynamic"
