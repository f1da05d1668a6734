"""Deep prompts in a bank beside plain ones: mixed batches equal rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.deep_rows_alone import deep_alone, deep_model
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank

LABELS = {"good": "fine", "bad": "dull"}

TEXTS = ["fine film", "very very dull plot film", "great", "no plot", "very lovely film plot : yes"]
NAMES = ["long", "plain", None, "short", "long"]


def mixed(tmp_path: Path, name: str, **options: Any) -> tuple[SoftPromptPipeline, spf.DeepPromptModel]:
    """A bank with a plain prompt and two deep ones from files, and the model that wrote those."""
    tuned = deep_model(name)
    tuned.save_pretrained(tmp_path)
    plain = torch.randn(5, tuned.base_model.get_input_embeddings().weight.shape[1])
    tuned.add_prompt("plain", init=plain)  # deep here, so that one oracle does for all
    bank = PromptBank(tuned.base_model, **options)
    bank.add_directory(tmp_path)
    bank.add("plain", plain)
    return SoftPromptPipeline(bank, tiny_tokenizer()), tuned


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_mixed_requests_equal_rows_alone(name: str, tmp_path: Path) -> None:
    pipe, tuned = mixed(tmp_path, name)
    rows = [torch.tensor(pipe.tokenizer(text).input_ids) for text in TEXTS]
    values = [None if prompt is None else tuned.prompts[prompt].detach() for prompt in NAMES]
    with torch.no_grad():
        expected = [
            deep_alone(tuned, ids, prompt)[-1].log_softmax(-1) for ids, prompt in zip(rows, values, strict=True)
        ]
    words = [pipe.tokenizer(word).input_ids[0] for word in LABELS.values()]
    for found, logits in zip(pipe.classify(TEXTS, NAMES, labels=LABELS), expected, strict=True):
        probabilities = logits[words].softmax(-1).tolist()
        assert list(found["scores"].values()) == pytest.approx(probabilities, rel=1e-4)
    together = pipe.generate(TEXTS, NAMES, max_new_tokens=5, do_sample=False)
    for text, prompt, ids, found in zip(TEXTS, NAMES, rows, together, strict=True):
        assert found == pipe.generate([text], [prompt], max_new_tokens=5, do_sample=False)[0]
        said = tuned.generate(ids[None], None, [prompt], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert found["text"] == pipe.tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)
    vectors = pipe.embed(TEXTS, NAMES, pooling="last")
    for ids, prompt, found in zip(rows, NAMES, vectors, strict=True):
        states = tuned(ids[None], prompt_ids=[prompt], output_hidden_states=True).hidden_states[-1]
        assert torch.from_numpy(found["embedding"]).allclose(states[0, -1], rtol=1e-4, atol=1e-5)
    assert pipe.bank.uncompiled is None


def test_the_first_batch_is_compared_and_a_difference_is_not_served(tmp_path: Path) -> None:
    pipe, _ = mixed(tmp_path, "llama")
    with pipe.bank.use(["long"]) as view:
        assert view.compiled is not None
        view.compiled[:, :, view.prefixes[0][0]] += 3  # not what its folder says
    found = pipe.classify(TEXTS, NAMES, labels=LABELS)
    assert pipe.bank.uncompiled is not None and "differ by" in pipe.bank.uncompiled
    assert ["error" in row for row in found] == [name in ("long", "short") for name in NAMES]
    assert "deep prompts run only compiled: they differ by" in found[0]["error"]


def test_a_bank_too_small_and_models_without_compiled_prompts_refuse(tmp_path: Path) -> None:
    pipe, tuned = mixed(tmp_path, "llama", budget=8 * PromptBank(build("llama")).bytes_per_token)
    with pytest.raises(ValueError, match="the budget is too small"), pipe.bank.use(["short", "long"]):
        pass
    with pipe.bank.use(["long"]) as view:  # one after the other they make room
        assert view.compiled is not None
    bare = PromptBank(tuned.base_model, budget=0)
    with pytest.raises(ValueError, match="prompt 'x' is a deep prompt, which runs only compiled: the budget of 0"):
        bare.add("x", tmp_path / "short")
    with pytest.raises(ValueError, match=r"is a deep prompt, which this model cannot run: .* ignores"):
        PromptBank(build("bloom")).add("x", tmp_path / "short", force=True)


def test_compiled_files_and_a_model_of_deep_prompts(tmp_path: Path) -> None:
    pipe, tuned = mixed(tmp_path / "prompts", "llama")
    expected = pipe.classify(TEXTS, NAMES, labels=LABELS)
    pipe.bank.save_compiled(tmp_path / "compiled")
    again = PromptBank(tuned.base_model)
    assert sorted(again.load_compiled(tmp_path / "compiled")) == ["long", "plain", "short"]
    taken_over = PromptBank(tuned)
    for bank in (again, taken_over):
        found = SoftPromptPipeline(bank, pipe.tokenizer).classify(TEXTS, NAMES, labels=LABELS)
        for a, b in zip(found, expected, strict=True):
            assert a["scores"] == pytest.approx(b["scores"], rel=1e-4)
