"""``generate`` of every kind of decoder and of every way to call it; options are in test_generation_options.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.real_tokens import GREEDY, ROWS, prompt_tokens, rows_alone, with_real_prompts
from support.serving import tiny_tokenizer
from support.tiny_models import COMMON, LLAMA, build
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.evaluation.predictions import predict
from softprompt_fast.inference import PromptBank, SoftPromptPipeline
from softprompt_fast.tasks.task import Task

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128}
GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SSM: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
NEMOTRON: dict[str, Any] = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MAMBA_LAYERS = ["mamba", "attention", "mamba"]

# Models without `inputs_embeds` in transformers' generate, with states instead of keys, without a cache, and others.
KINDS: dict[str, Callable[[], Any]] = {
    "ctrl": lambda: tf.CTRLConfig(**GPT, dff=48),
    "openai-gpt": lambda: tf.OpenAIGPTConfig(**GPT),
    "xlm": lambda: tf.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, causal=True, mask_token_id=5),
    "xlnet": lambda: tf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "roc_bert": lambda: tf.RoCBertConfig(**SMALL, is_decoder=True, pronunciation_vocab_size=96, shape_vocab_size=96),
    "bert": lambda: tf.BertConfig(**SMALL, is_decoder=True),
    "bamba": lambda: tf.BambaConfig(**LLAMA, **SSM, mamba_expand=2, attn_layer_indices=[1]),
    "falcon_h1": lambda: tf.FalconH1Config(**LLAMA, **SSM, mamba_d_ssm=64),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **{k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, **NEMOTRON, layers_block_type=MAMBA_LAYERS
    ),
    "zamba2": lambda: tf.Zamba2Config(
        **(COMMON | SMALL | {"num_hidden_layers": 3}),
        mamba_d_state=8,
        n_mamba_heads=8,
        num_mem_blocks=1,
        attention_hidden_size=64,
        attention_head_dim=16,
        layers_block_type=["mamba", "hybrid", "mamba"],
    ),
    "mamba": lambda: tf.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **(COMMON | SMALL | {"num_hidden_layers": 3}), num_key_value_heads=1, attention_window_size=16, lru_width=32
    ),
    "gemma3": lambda: tf.Gemma3Config(
        text_config=LLAMA | {"sliding_window": 5, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        image_token_index=93,
        boi_token_index=94,
        eoi_token_index=95,
        mm_tokens_per_image=1,
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **(COMMON | SMALL | LATENT), n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1, sliding_window=5),
}


def random_model(name: str) -> Any:
    if name == "nemotron_h" and not hasattr(tf, "NemotronHConfig"):
        pytest.skip("this transformers has no such model")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(KINDS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(6, 90, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:], mask[3, 1:] = 0, 0, 0
    return ids, mask


def check(found: Tensor, ids: Tensor, expected: list[Tensor]) -> None:
    assert torch.equal(found[:, : ids.shape[1]], ids)
    for row, wanted in enumerate(expected):
        assert torch.equal(found[row, None, ids.shape[1] :], wanted), (row, found[row], wanted)


@pytest.mark.parametrize("name", KINDS)
def test_each_row_gets_the_text_of_the_plain_model(name: str) -> None:
    model = random_model(name)
    tuned = with_real_prompts(model)
    ids, mask = rows()
    expected = rows_alone(model, ids, mask, ROWS, GREEDY)
    check(tuned.generate(ids, mask, ROWS, **GREEDY), ids, expected)
    places = torch.tensor([[-1 if name is None else list(tuned.prompts).index(name)] for name in ROWS])[:, 0]
    check(tuned.generate(ids, mask, places, use_cache=False, **GREEDY), ids, expected)


@pytest.mark.parametrize("name", ["bloom", "bamba", "mamba", "openai-gpt"])
def test_beams_of_models_without_the_packed_layout(name: str) -> None:
    model = random_model(name) if name in KINDS else build(name)
    tuned = with_real_prompts(model)
    ids, mask = rows()
    options = GREEDY | {"num_beams": 3}
    check(tuned.generate(ids, mask, ROWS, **options), ids, rows_alone(model, ids, mask, ROWS, options))


@pytest.mark.parametrize("name", ["bloom", "xlm"])
def test_speculation_without_a_cache_is_refused(name: str) -> None:
    model = random_model(name) if name in KINDS else build(name)
    tuned = with_real_prompts(model)
    text, options = rows()[0][:1, :4].repeat(1, 2), GREEDY | {"prompt_lookup_num_tokens": 2}
    if name == "bloom":
        assert torch.equal(tuned.generate(text, None, "long", **options), tuned.generate(text, None, "long", **GREEDY))
    else:
        with pytest.raises(ValueError, match="speculative decoding cannot be combined with XLMWithLMHeadModel"):
            tuned.generate(text, None, "long", **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma2"])
@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False},
        {"generation_config": tf.GenerationConfig(use_cache=False, **GREEDY)},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
    ],
)
def test_deep_prompts_with_other_ways_to_the_same_text(name: str, change: dict[str, Any]) -> None:
    tuned = deep_model(name)
    ids, mask = rows()
    expected = tuned.generate(ids, mask, ROWS, **GREEDY)
    options = change if "generation_config" in change else GREEDY | change
    assert torch.equal(tuned.generate(ids, mask, ROWS, **options), expected)
    tuned.base_model.config.use_cache = False
    assert torch.equal(tuned.generate(ids, mask, ROWS, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_speculative_decoding_after_deep_prompts(name: str) -> None:
    tuned = deep_model(name)
    options = GREEDY | {"max_new_tokens": 16}
    for row in rows()[0]:
        text = row[None, :5].repeat(1, 2)
        expected = tuned.generate(text, None, "long", **options)
        assert torch.equal(tuned.generate(text, None, "long", prompt_lookup_num_tokens=3, **options), expected)
        assistant = build("gpt2")
        assert torch.equal(tuned.generate(text, None, "long", assistant_model=assistant, **options), expected)


def test_lengths_count_neither_prompts_nor_neighbours() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = None
    ids, mask = rows()
    config = tf.GenerationConfig(max_length=12, pad_token_id=0)
    for tuned in (with_real_prompts(model), deep_model("llama")):
        found = tuned.generate(ids, mask, ROWS, generation_config=config)
        for row, prompt in enumerate(ROWS):
            text = ids[row][mask[row] == 1][None]
            alone = tuned.generate(text, None, [prompt], generation_config=config)
            assert alone.shape == (1, 12)
            new = alone[:, text.shape[1] :]
            assert torch.equal(found[row, None, 9 : 9 + new.shape[1]], new) and not found[row, 9 + new.shape[1] :].any()


def test_a_pipeline_counts_each_text_alone() -> None:
    model = build("llama")
    model.generation_config.eos_token_id, model.generation_config.max_length = None, 18
    bank = PromptBank(model)
    bank.add("p", torch.randn(9, 32))
    pipe = SoftPromptPipeline(bank, tiny_tokenizer())
    texts, names = ["fine film", "film plot no yes great fine film"], [None, "p"]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": 95}
    together = pipe.generate(texts, names, **options)
    assert together == [pipe.generate([text], [name], **options)[0] for text, name in zip(texts, names, strict=True)]
    no_cache = pipe.generate(texts, names, use_cache=False, **options)
    assert no_cache == together


@pytest.mark.parametrize("own", [None, 3, [3, 4]])
def test_text_ends_at_the_end_that_was_trained(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("film")
    tokenizer.eos_token = "film"
    model.generation_config.eos_token_id = own
    tuned = with_real_prompts(model)
    pipe = SoftPromptPipeline(PromptBank(tuned), tokenizer)
    real, asked = model.generate, []

    def spy(*args: Any, **keywords: Any) -> Any:
        output = real(*args, **keywords)
        asked.append((keywords["eos_token_id"], output.shape[1] - keywords["input_ids"].shape[1]))
        return output

    monkeypatch.setattr(model, "generate", spy)
    forced = {"max_new_tokens": 8, "do_sample": False, "sequence_bias": [[[end], 99.0]]}
    every = [*([own] if isinstance(own, int) else own or []), end]
    pipe.generate(["yes no"], "long", **forced)
    pipe.generate(["yes no"], "long", **forced, eos_token_id=4)
    assert asked == [(every, 1), (4, 8)]
    task = Task("generation", "{text}", "label", prompt="long")
    asked.clear()
    predict(tuned, tokenizer, task, [{"text": "yes no"}], max_new_tokens=2)
    assert asked[0][0] == every


def test_ids_under_either_name_and_what_a_tokenizer_returns() -> None:
    tuned = with_real_prompts(build("llama"))
    ids, mask = rows()
    expected = tuned.generate(ids, mask, ROWS, **GREEDY)
    whole = {"attention_mask": mask, "token_type_ids": ids * 0, "special_tokens_mask": ids * 0, "prompt_ids": ROWS}
    assert torch.equal(tuned.generate(inputs=ids, **whole, **GREEDY), expected)
    with pytest.raises(ValueError, match="give `input_ids` or `inputs`, not both"):
        tuned.generate(ids, inputs=ids, prompt_ids="long")
    with pytest.raises(ValueError, match="`input_ids` must be given"):
        tuned.generate(prompt_ids="long")
    with pytest.raises(ValueError, match=r"`input_ids` must be \[B, T\], got \[9\]"):
        tuned.generate(ids[0], prompt_ids="long")
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of input_ids \[4, 9\], got \[4, 8\]"):
        tuned.generate(ids, mask[:, 1:], ROWS)
    with pytest.raises(ValueError, match="`attention_mask` must be 1 and 0, got -inf"):
        tuned.generate(ids, mask.float().log(), ROWS)
    with pytest.raises(ValueError, match="`input_ids` must be 0 to 95, got 96"):
        tuned.generate(ids.index_fill(1, torch.tensor(8), 96), torch.ones_like(ids), ROWS)
    for name in ("inputs_embeds", "position_ids", "past_key_values", "cache"):
        with pytest.raises(ValueError, match=f"`{name}` cannot be given"):
            tuned.generate(ids, prompt_ids="long", **{name: ids})


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_rows_without_a_text(name: str) -> None:
    model = build(name)
    tuned = with_real_prompts(model)
    ids, mask = rows()
    mask[0], mask[3] = 0, 0
    options = GREEDY | {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    found = tuned.generate(ids, mask, ["long", "long", None, "short"], **options)
    for row, prompt in ((0, "long"), (3, "short")):
        vectors = model.get_input_embeddings()(prompt_tokens()[prompt][None])
        assert torch.equal(found[row, 9:], model.generate(inputs_embeds=vectors, **options)[0])


def test_more_than_the_context_is_refused_with_the_numbers() -> None:
    tuned = with_real_prompts(build("llama"))
    ids = torch.full((1, 125), 7)
    with pytest.raises(ValueError, match="128 positions together with the prompt: got 125 tokens after 7"):
        tuned.generate(ids, prompt_ids="long", max_new_tokens=1)


def test_a_changed_prompt_or_model_is_noticed() -> None:
    model = build("llama")
    tuned = with_real_prompts(model)
    ids, mask = rows()

    def fresh() -> Tensor:
        other = spf.SoftPromptModel(model)
        for name in tuned.prompts:
            other.add_prompt(name, init=tuned.prompts[name].detach())
        found: Tensor = other.generate(ids, mask, ROWS, **GREEDY)
        return found

    first = tuned.generate(ids, mask, ROWS, **GREEDY)
    tuned.prompts["long"].data.normal_()  # moves no version counter
    second = tuned.generate(ids, mask, ROWS, **GREEDY)
    assert not torch.equal(first, second) and torch.equal(second, fresh())
    model.model.layers[1].mlp.down_proj.weight.data.mul_(3)
    third = tuned.generate(ids, mask, ROWS, **GREEDY)
    assert not torch.equal(third, second) and torch.equal(third, fresh())


def test_two_threads_on_one_model() -> None:
    model = build("bloom")
    tuned = with_real_prompts(model)
    ids, mask = rows()
    expected = {name: tuned.generate(ids, mask, name, **GREEDY) for name in ("short", "long")}
    found: dict[str, list[Tensor]] = {"short": [], "long": []}

    def work(name: str) -> None:
        found[name] += [tuned.generate(ids, mask, name, **GREEDY) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[name]) and len(found[name]) == 4 for name in found for one in found[name])


def test_a_row_decides_itself_which_tokens_are_allowed() -> None:
    tuned = with_real_prompts(build("llama"))
    ids, mask = rows()
    seen: list[tuple[int, list[int]]] = []

    def allowed(row: int, text: Tensor) -> list[int]:
        seen.append((row, text.tolist()))
        return [row + 10, row + 40]

    found = tuned.generate(ids, mask, ROWS, prefix_allowed_tokens_fn=allowed, **GREEDY)
    for row in range(4):
        assert set(found[row, 9:].tolist()) <= {row + 10, row + 40}
        first = next(text for place, text in seen if place == row)
        assert first == ids[row][mask[row] == 1].tolist()


def test_outputs_of_groups_are_put_together() -> None:
    tuned = with_real_prompts(build("llama"))
    ids, mask = rows()
    options = GREEDY | {"no_repeat_ngram_size": 2, "return_dict_in_generate": True, "output_scores": True}
    found = tuned.generate(ids, mask, ROWS, **options, num_beams=2)
    plain = tuned.generate(ids, mask, ROWS, **options)
    assert found.sequences_scores.shape == (4,) and len(plain.scores) == 6 and plain.past_key_values is None
    for row, prompt in enumerate(ROWS):
        text = ids[row][mask[row] == 1][None]
        alone = tuned.generate(text, None, [prompt], **options)
        assert torch.allclose(plain.scores[3][row], alone.scores[3][0], atol=1e-4)
        beams = tuned.generate(text, None, [prompt], **options, num_beams=2)
        assert found.sequences_scores[row] == pytest.approx(beams.sequences_scores[0].item(), rel=1e-4)


@pytest.mark.parametrize("option", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_encoder_decoders_refuse_what_reads_the_encoders_ids(option: str) -> None:
    tuned = with_real_prompts(build("t5"))
    with pytest.raises(ValueError, match=f"`{option}`=2 cannot be combined with soft prompts"):
        tuned.generate(rows()[0], prompt_ids="long", **{option: 2})


def test_generation_in_training_mode_is_without_dropout() -> None:
    model = build("gpt2")
    tuned = with_real_prompts(model)
    ids, mask = rows()
    expected = tuned.generate(ids, mask, ROWS, **GREEDY)
    tuned.train()
    tuned.gradient_checkpointing_enable()
    assert torch.equal(tuned.generate(ids, mask, ROWS, **GREEDY), expected)
    assert model.training
