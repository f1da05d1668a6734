"""SoftPromptModel: freezing, refusing, generation options, files that PEFT reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support.tiny_models import LLAMA, batch, build

import softprompt_fast as spf


def tuned_model(name: str = "llama") -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build(name))
    tuned.add_prompt("movies", init=torch.randn(4, tuned.prompts.embedding_dim) * 0.5)
    return tuned


def test_only_prompts_are_trainable() -> None:
    tuned = tuned_model()
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == ["prompts.prompt_movies"]


def test_bfloat16_model_with_float32_prompts_trains() -> None:
    tuned = spf.SoftPromptModel(build("llama", dtype=torch.bfloat16))
    tuned.add_prompt("a", 4, init="vocabulary")
    ids, mask = batch()
    tuned(ids, mask, labels=ids).loss.backward()
    assert tuned.prompts["a"].dtype == tuned.prompts["a"].grad.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    tuned = tuned_model()
    ids, mask = batch()
    tuned.train()
    tuned(ids, mask, labels=ids).loss.backward()
    expected = tuned.prompts["movies"].grad.clone()
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable({"use_reentrant": False})
    tuned(ids, mask, labels=ids).loss.backward()
    assert torch.allclose(tuned.prompts["movies"].grad, expected, rtol=1e-5, atol=1e-7)


def test_next_token_logits_are_those_of_forward() -> None:
    tuned = tuned_model()
    ids, mask = batch()
    logits = tuned(ids, mask).logits
    last = torch.stack([logits[row][mask[row].bool()][-1] for row in range(len(ids))])
    assert torch.allclose(tuned.next_token_logits(ids, mask), last, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "opt", "bloom", "llama"])
def test_next_token_logits_are_those_of_forward_in_the_padded_layout(name: str) -> None:
    model = build(name)
    if name == "roberta":  # counts positions in its own way, from padding_idx + 1
        model.config.is_decoder = True
        model = tf.RobertaForCausalLM(model.config).eval()
        with torch.no_grad():
            model.roberta.embeddings.position_embeddings.weight.normal_(0, 0.25)
    tuned = spf.SoftPromptModel(model, execution="padded")
    tuned.add_prompt("movies", init=torch.randn(4, tuned.prompts.embedding_dim) * 0.5)
    ids, mask = batch()
    rows = ["movies", None, "movies", None]
    got = tuned.next_token_logits(ids, mask, rows)
    logits = tuned(ids, mask, prompt_ids=rows).logits
    for row in range(len(ids)):
        assert torch.allclose(got[row], logits[row][mask[row].bool()][-1], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_generation_options(options: dict[str, Any]) -> None:
    tuned = tuned_model()
    ids, mask = batch()
    result = tuned.generate(ids, mask, max_new_tokens=5, min_new_tokens=5, **options)
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    copies = options.get("num_return_sequences", 1)
    assert sequences.shape == (len(ids) * copies, ids.shape[1] + 5)
    assert torch.equal(sequences[:, : ids.shape[1]], ids.repeat_interleave(copies, 0))


def test_max_length_counts_text_not_prompts() -> None:
    tuned = tuned_model()
    ids = torch.randint(3, 90, (2, 6))
    assert tuned.generate(ids, max_length=10, min_length=10).shape == (2, 10)


def test_repetition_penalty_sees_the_text_and_not_the_stand_ins() -> None:
    tuned = tuned_model()
    ids = torch.randint(3, 90, (1, 6))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "repetition_penalty": 3.0}
    seen = set(ids[0].tolist())
    scores = tuned.generate(ids, return_dict_in_generate=True, output_scores=True, **options).scores[0][0]
    raw = tuned.next_token_logits(ids)[0]
    for token in range(3, 90):
        expected = raw[token] * (3.0 if raw[token] < 0 else 1 / 3.0) if token in seen else raw[token]
        assert scores[token] == pytest.approx(expected.item(), rel=1e-4)


def test_a_streamer_gets_text_and_new_tokens_only() -> None:
    class Heard(tf.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    heard = Heard()
    tuned = tuned_model()
    ids = torch.randint(3, 90, (1, 6))
    result = tuned.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, streamer=heard)
    assert heard.tokens == [*result[0].tolist(), -1]


# --- what is refused ---


def test_per_layer_embeddings_are_refused() -> None:
    config = tf.Gemma3nTextConfig(**LLAMA, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(TypeError, match="per-layer embeddings"):
        spf.SoftPromptModel(model)


def test_other_things_than_models_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        spf.SoftPromptModel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="embedding_dim=32 like the model, got 8"):
        spf.SoftPromptModel(build("llama"), spf.FastSoftPrompt(8))


@pytest.mark.parametrize("argument", ["position_ids", "past_key_values"])
def test_arguments_that_are_worked_out_here_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` cannot be given"):
        tuned_model()(torch.ones(1, 3, dtype=torch.long), **{argument: torch.ones(1, 3)})


def test_encoders_do_not_generate() -> None:
    with pytest.raises(TypeError, match="cannot generate"):
        tuned_model("bert").generate(torch.ones(1, 3, dtype=torch.long))


# --- files ---


def test_save_and_load_round_trip_and_train_on(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.add_prompt("tweets", init=torch.randn(2, 32))
    tuned.save_pretrained(tmp_path)
    again = spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path)
    assert again.prompts.lengths == {"movies": 4, "tweets": 2}
    assert torch.equal(again.prompts["movies"], tuned.prompts["movies"]) and again.prompts["movies"].requires_grad
    one = spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path, names=["tweets"])
    assert one.prompts.names == ["tweets"]
    single = spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path / "movies")
    assert single.prompts.names == ["movies"]
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob(".*"))


def test_peft_reads_ours(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "movies")
    assert torch.equal(theirs.get_prompt(1)[0], tuned.prompts["movies"])
    ids = torch.randint(3, 90, (2, 5))
    assert torch.allclose(theirs(input_ids=ids).logits[:, 4:], tuned(ids).logits, atol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_we_read_peft(tmp_path: Path, name: str, task: str) -> None:
    theirs = peft.get_peft_model(build(name), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=6))
    theirs.save_pretrained(tmp_path / "a")
    tuned = spf.SoftPromptModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(tuned.prompts["a"], theirs.prompt_encoder["default"].embedding.weight[:6])
    ids = torch.randint(3, 90, (2, 5))
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    theirs.eval()
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    got = tuned(ids, **extra).logits
    assert torch.allclose(got, expected if name == "t5" else expected[:, 6:], atol=1e-5)


def _break(folder: Path, what: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    if what == "missing":
        weights.unlink()
    elif what == "lora":
        config["peft_type"] = "LORA"
    elif what == "rows":
        config["num_virtual_tokens"] = 3
    elif what == "nan":
        save_file({"prompt_embeddings": torch.full((4, 32), float("nan"))}, weights)
    elif what == "width":
        save_file({"prompt_embeddings": torch.zeros(4, 16)}, weights)
    elif what == "keys":
        save_file({"a": torch.zeros(4, 32), "b": torch.zeros(4, 32)}, weights)
    elif what == "pickle":
        torch.save({"prompt_embeddings": torch.zeros(4, 32)}, weights)
    (folder / "adapter_config.json").write_text("{" if what == "json" else json.dumps(config))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("missing", FileNotFoundError, "no prompt was found"),
        (
            "lora",
            ValueError,
            "`peft_type` must be PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING or CPT, got 'LORA'$",
        ),
        ("rows", ValueError, r"num_virtual_tokens=3 rows, got \[4, 32\]"),
        ("nan", ValueError, "must be finite"),
        ("width", ValueError, "hidden size 32, got 16"),
        ("keys", ValueError, "must hold one tensor"),
        ("pickle", ValueError, "must be a safetensors file"),
        ("json", ValueError, "must be JSON"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, what: str, error: type[Exception], message: str) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    _break(tmp_path / "movies", what)
    with pytest.raises(error, match=message):
        spf.SoftPromptModel.from_pretrained(tuned.base_model, tmp_path)


def test_the_file_is_the_prompt_and_nothing_else(tmp_path: Path) -> None:
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "movies" / "adapter_model.safetensors")
    assert list(stored) == ["prompt_embeddings"] and stored["prompt_embeddings"].dtype == torch.float32
