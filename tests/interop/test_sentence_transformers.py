"""Sentence embeddings after a prompt: equal to each text run alone by the plain model, trained, saved and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import ALL
from support.tiny_reviews import tiny_tokenizer
from torch import Tensor

import softprompt_fast as spf

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from softprompt_fast.interop.sentence_transformers import SoftPromptEmbedder
from softprompt_fast.models.pooling import POOLINGS

TEXTS = ["film great plot", "dull", "film very very dull plot film"]


def base_model(name: str, kind: str = "AutoModel") -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(ALL[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def embedder(name: str, kind: str = "AutoModel", side: str = "right", **options: Any) -> SoftPromptEmbedder:
    tuned = spf.SoftPromptModel(base_model(name, kind))
    tuned.add_prompt("topics", init=torch.randn(3, 32))
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return SoftPromptEmbedder(tuned, tokenizer, **options)


@torch.no_grad()
def alone(module: SoftPromptEmbedder, text: str, pooling: str) -> Tensor:
    """[D], by the plain model: the prompt's vectors and the text's, no padding, the prompt's places cut off."""
    base = module.model.base_model
    base = getattr(base, "model", base)
    ids = torch.tensor([module.tokenizer(text)["input_ids"]])
    vectors = torch.cat([module.model.prompts["topics"][None], base.get_input_embeddings()(ids)], 1)
    states = base(inputs_embeds=vectors).last_hidden_state[0, 3:]
    return states.mean(0) if pooling == "mean" else states[0 if pooling == "first" else -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "name, kind",
    [("bert", "AutoModel"), ("roberta", "AutoModel"), ("modernbert", "AutoModel"), ("llama", "AutoModel"),
     ("gpt2", "AutoModel"), ("llama", "AutoModelForCausalLM")],
)  # fmt: skip
def test_embeddings_are_those_of_each_text_alone(name: str, kind: str, pooling: str, side: str) -> None:
    module = embedder(name, kind, side, pooling=pooling)
    model = SentenceTransformer(modules=[module])
    found = model.encode(TEXTS, convert_to_tensor=True, batch_size=3)
    expected = torch.stack([alone(module, text, pooling) for text in TEXTS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert model.get_embedding_dimension() == 32


def test_another_pooling_can_follow() -> None:
    module = embedder("bert")
    plain = SentenceTransformer(modules=[module])
    pooled = SentenceTransformer(modules=[module, Pooling(32, "mean")])
    torch.testing.assert_close(
        pooled.encode(TEXTS, convert_to_tensor=True), plain.encode(TEXTS, convert_to_tensor=True), atol=1e-6, rtol=1e-5
    )


def test_words_in_front_and_long_texts() -> None:
    module = embedder("bert", max_seq_length=3)
    model = SentenceTransformer(modules=[module], prompts={"query": "film "})
    assert model.max_seq_length == 3
    both = model.encode(["great plot dull dull", "great plot"], prompt_name="query", convert_to_tensor=True)
    cut = model.encode(["film great plot"], convert_to_tensor=True)
    torch.testing.assert_close(both, cut.expand(2, -1), atol=1e-6, rtol=1e-5)
    assert embedder("bert").max_seq_length == 128 - 3


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_only_the_prompt_is_trained(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    module = embedder(name)
    model = SentenceTransformer(modules=[module])
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    rows = {
        "anchor": ["film great", "dull plot", "very dull", "great"],
        "positive": ["great", "dull", "dull film", "film"],
    }
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, per_device_train_batch_size=4, report_to=[],
        save_steps=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
        loss=MultipleNegativesRankingLoss(model),
    ).train()  # fmt: skip
    changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) == 1 and changed[0].endswith("topics")
    loaded = load(tmp_path / "checkpoint-3")
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True))


def load(folder: Path) -> SentenceTransformer:
    """sentence-transformers asks for this flag before it imports any package but its own."""
    return SentenceTransformer(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    base_model(name).save_pretrained(tmp_path / "named")
    tuned = spf.SoftPromptModel(transformers.AutoModel.from_pretrained(tmp_path / "named"))
    tuned.add_prompt("topics", init=torch.randn(3, 32))
    tuned.add_prompt("other", 2)
    model = SentenceTransformer(
        modules=[SoftPromptEmbedder(tuned, tiny_tokenizer(), prompt="topics", pooling="last", max_seq_length=4)]
    )
    expected = model.encode(TEXTS, convert_to_tensor=True)
    model.save(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "soft_prompt" / "topics" / "adapter_config.json").is_file()
    assert (
        not (tmp_path / "saved" / "base_model").exists() and not (tmp_path / "saved" / "soft_prompt" / "other").exists()
    )
    loaded = load(tmp_path / "saved")
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), expected)
    assert loaded.max_seq_length == 4 and loaded[0].pooling == "last"


def test_a_base_without_a_name_moves_with_the_module(tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[embedder("bert")])
    expected = model.encode(TEXTS, convert_to_tensor=True)
    model.save(str(tmp_path / "first"))
    load(tmp_path / "first").save(str(tmp_path / "second"))
    shutil.rmtree(tmp_path / "first")
    assert torch.equal(load(tmp_path / "second").encode(TEXTS, convert_to_tensor=True), expected)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="`pooling` must be mean, first or last, got 'cls'"):
        embedder("bert", pooling="cls")
    with pytest.raises(ValueError, match="`prompt` must be one of topics, got 'x'"):
        embedder("bert", prompt="x")
    module = embedder("bert")
    module.model.add_prompt("second", 2)
    with pytest.raises(ValueError, match="`prompt` must name one of the model's prompts"):
        SoftPromptEmbedder(module.model, module.tokenizer)
    with pytest.raises(ValueError, match="`inputs` must hold a token each, got '' at 1"):
        module.preprocess(["film", ""])
    seq2seq = spf.SoftPromptModel(base_model("t5", "AutoModelForSeq2SeqLM"))
    seq2seq.add_prompt("p", 2)
    with pytest.raises(TypeError, match="`model` must be an encoder or a decoder, got T5ForConditionalGeneration"):
        SoftPromptEmbedder(seq2seq, module.tokenizer)


@pytest.mark.parametrize("how", ["wrapped", "added"])
def test_a_base_with_adapters_is_refused_because_it_could_not_be_loaded(how: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, lora = base_model("bert"), peft.LoraConfig(r=2, target_modules=["query"])
    if how == "wrapped":
        base = peft.get_peft_model(base, lora)
    else:
        base.add_adapter(lora)
    tuned = spf.SoftPromptModel(base)
    tuned.add_prompt("p", 2)
    with pytest.raises(
        TypeError, match=r"`model` must have a base model without adapters, got \w+; merge them"
    ) as told:
        SoftPromptEmbedder(tuned, tiny_tokenizer())
    assert "\n" not in str(told.value)
    if how == "wrapped":
        base.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = spf.SoftPromptModel(transformers.AutoModel.from_pretrained(tmp_path / "merged"))
        merged.add_prompt("p", 2)
        model = SentenceTransformer(modules=[SoftPromptEmbedder(merged, tiny_tokenizer())])
        model.save(str(tmp_path / "saved"))
        expected = model.encode(TEXTS, convert_to_tensor=True)
        assert torch.equal(load(tmp_path / "saved").encode(TEXTS, convert_to_tensor=True), expected)


def test_a_class_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Own(transformers.BertModel):
        pass

    tuned = spf.SoftPromptModel(Own(ALL["bert"]()))
    tuned.add_prompt("p", 2)
    with pytest.raises(TypeError, match="`base_class` must be a model of transformers, got 'Own'"):
        SoftPromptEmbedder(tuned, tiny_tokenizer()).save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_a_mean_in_half_precision_is_taken_in_float32() -> None:
    module = embedder("bert")
    states = torch.randn(2, 400, 32).bfloat16()
    expected = states.float().mean(1).bfloat16()
    assert torch.equal(module._pooled(states, torch.ones(2, 400, dtype=torch.int64)), expected)
