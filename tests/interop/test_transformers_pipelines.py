"""transformers' own pipelines around a model with prompts: the results are the model's, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

import softprompt_fast as spf

TEXTS = ["film great plot", "very dull", "film"]


def tuned_and_tokenizer(name: str, head: str | None, side: str) -> tuple[spf.SoftPromptModel, Any]:
    tuned = spf.SoftPromptModel(build(name, head))
    tuned.add_prompt("movies", init=torch.randn(3, 32))
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return tuned, tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_text_generation(name: str, side: str) -> None:
    tuned, tokenizer = tuned_and_tokenizer(name, None, side)
    tuned.add_prompt("tweets", init=torch.randn(2, 32))
    pipe = transformers.pipeline("text-generation", model=tuned, tokenizer=tokenizer)
    tokenizer.padding_side = side
    for prompt in ("movies", "tweets"):
        options = {"prompt_ids": prompt, "max_new_tokens": 5, "do_sample": False}
        found = pipe(TEXTS, batch_size=3, return_tensors=True, **options)
        for text, ((one,), plain) in zip(TEXTS, zip(found, map(tokenizer, TEXTS), strict=True), strict=True):
            ids = torch.tensor([plain["input_ids"]])
            alone = tuned.generate(ids, prompt_ids=prompt, max_new_tokens=5, do_sample=False)[0]
            got = [token for token in one["generated_token_ids"] if token != tokenizer.pad_token_id]
            assert got == [token for token in alone.tolist() if token != tokenizer.pad_token_id], text
    with pytest.raises(ValueError, match="prompt_ids"):
        pipe(TEXTS, max_new_tokens=5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_text_classification(name: str, side: str) -> None:
    tuned, tokenizer = tuned_and_tokenizer(name, "SequenceClassification", side)
    pipe = transformers.pipeline("text-classification", model=tuned, tokenizer=tokenizer)
    found = pipe(TEXTS, batch_size=3, top_k=None)
    for text, scores in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = tuned(ids).logits.softmax(-1)[0]
        by_label = {one["label"]: one["score"] for one in scores}
        got = torch.tensor([by_label[tuned.config.id2label[i]] for i in range(len(expected))])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_token_classification(name: str) -> None:
    tuned, tokenizer = tuned_and_tokenizer(name, "TokenClassification", "right")
    pipe = transformers.pipeline("token-classification", model=tuned, tokenizer=tokenizer)
    for text, words in zip(TEXTS, pipe(TEXTS, batch_size=3), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = tuned(ids).logits.softmax(-1)[0].max(-1)
        real = [i for i, token in enumerate(ids[0].tolist()) if token not in tokenizer.all_special_ids]
        assert [word["entity"] for word in words] == [tuned.config.id2label[int(expected.indices[i])] for i in real]
        got = torch.tensor([float(word["score"]) for word in words])
        torch.testing.assert_close(got, expected.values[real], atol=1e-5, rtol=1e-5)
