"""A prompt after BOS: its first vector is BOS's and is not trained, and texts come without BOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows_alone import relative
from support.tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast

import softprompt_fast as spf
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.prompts.placement import FixedFirst, bos_vector
from softprompt_fast.tasks.encoding import encode_text
from softprompt_fast.tasks.task import Task

WORDS = ["<pad>", "<s>", "</s>", "a", "good", "film", "yes", "no"]


def tokenizer(bos: bool = True) -> Any:
    """Puts <s> in front of a text, as Llama's does."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", **special)


TASK = Task("classification", "{text}", "label", {"good": "yes", "bad": "no"}, special_tokens=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bos_prompt_text_equals_the_row_alone_and_bos_is_not_trained(name: str, tmp_path: Path) -> None:
    model = build(name)
    words = tokenizer()
    tuned = spf.SoftPromptModel(model)
    bos = bos_vector(tuned, words)
    values = torch.randn(4, len(bos)) * 0.5
    tuned.add_prompt("mine", init=torch.cat([bos[None], values]))
    parametrize.register_parametrization(tuned.prompts, "prompt_mine", FixedFirst(bos))
    text = encode_text(TASK, {"text": "a good film"}, words)
    assert (
        text == [3, 4, 5] and encode_text(Task(**vars(TASK) | {"special_tokens": True}), {"text": "a"}, words)[0] == 1
    )

    def by_hand() -> torch.Tensor:
        """[BOS][prompt][text], from token ids where there are some."""
        embedded = model.get_input_embeddings()(torch.tensor([1, *text]))
        learned = tuned.prompts["mine"][1:].detach()
        return model(inputs_embeds=torch.cat([embedded[:1], learned, embedded[1:]])[None]).logits[0, 5:]

    ids = torch.tensor([text])
    assert relative(tuned(ids, prompt_ids="mine").logits[0], by_hand()) < 1e-5
    optimizer = torch.optim.SGD(tuned.prompts.parameters(), lr=1.0)
    tuned(ids, labels=ids, prompt_ids="mine").loss.backward()
    gradient = tuned.prompts.parametrizations.prompt_mine.original.grad
    assert not gradient[0].any() and gradient[1:].any()
    optimizer.step()
    assert torch.equal(tuned.prompts["mine"][0], bos) and not torch.equal(tuned.prompts["mine"][1:], values)
    expected = by_hand()
    assert relative(tuned(ids, prompt_ids="mine").logits[0], expected) < 1e-5

    tuned.save_pretrained(tmp_path)
    TASK.save(tmp_path / "mine")
    bank = PromptBank(model)
    bank.add_directory(tmp_path)
    answer = SoftPromptPipeline(bank, words).classify(["a good film"], "mine")[0]
    wanted = expected[-1, [6, 7]].softmax(-1).tolist()
    assert list(answer["scores"].values()) == pytest.approx(wanted, rel=1e-4)
    assert not Task.load(tmp_path).special_tokens


def test_a_text_is_tokenised_for_each_way(tmp_path: Path) -> None:
    model = build("llama")
    bank = PromptBank(model)
    values = torch.randn(3, 32)
    bank.add("with", values, task=Task(**vars(TASK) | {"special_tokens": True}))
    bank.add("without", values, task=TASK)
    pipe = SoftPromptPipeline(bank, tokenizer())
    both = pipe.classify(["a good film"], ensemble=["with", "without"])[0]
    single = [pipe.classify(["a good film"], name)[0]["scores"]["good"] for name in ("with", "without")]
    assert single[0] != pytest.approx(single[1], rel=1e-3)
    assert both["scores"]["good"] == pytest.approx(sum(single) / 2, rel=1e-4)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`tokenizer` must have a beginning-of-sequence token, but .* has none"):
        bos_vector(build("llama"), tokenizer(bos=False))
    with pytest.raises(ValueError, match=r"`vector` must have shape \[D\] or \[k, D\], got \[1, 4, 2\]"):
        FixedFirst(torch.zeros(1, 4, 2))
