"""Models whose ``generate`` in transformers contradicts their forward: text follows forward, as training does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from support.real_tokens import GREEDY, ROWS, prompt_tokens, with_real_prompts
from support.tiny_models import BERT
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.inference.engine import Engine
from softprompt_fast.inference.prompt_bank import PromptBank

NEW_TOKENS = GREEDY["max_new_tokens"]


def spread(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


@pytest.fixture
def roberta() -> Any:
    """Positions begin after the padding's, with 4; transformers' ``generate`` numbers them from 0."""
    torch.manual_seed(0)
    return spread(tf.RobertaForCausalLM(tf.RobertaConfig(**BERT | {"pad_token_id": 3}, is_decoder=True)))


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(6, 90, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:], mask[3, 1:] = 0, 0, 0
    return ids, mask


def by_forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, N], the likeliest next tokens of each row alone, each from a new run of the plain model."""
    tokens, found = prompt_tokens(), []
    for row, real, prompt in zip(ids, mask, ROWS, strict=True):
        text = row[real == 1] if prompt is None else torch.cat([tokens[prompt], row[real == 1]])
        start = len(text)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text[None]).logits[0, -1].argmax()[None]])
        found.append(text[start:])
    return torch.stack(found)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": True},  # with the prompt's vectors in the first call
        {"output_attentions": True, "return_dict_in_generate": True, "use_cache": False},
        {"num_beams": 3, "output_attentions": True, "return_dict_in_generate": True},
    ],
)
def test_text_of_roberta_follows_its_forward(roberta: Any, change: dict[str, Any]) -> None:
    ids, mask = rows()
    expected = by_forward(roberta, ids, mask)
    tuned = with_real_prompts(roberta)
    found = tuned.generate(ids, mask, ROWS, **GREEDY | change)
    new = (found if isinstance(found, Tensor) else found.sequences)[:, -NEW_TOKENS:]
    if "num_beams" in change:  # as without attentions, after compiled prompts
        expected = tuned.generate(ids, mask, ROWS, **GREEDY, num_beams=3)[:, -NEW_TOKENS:]
    assert torch.equal(new, expected)
    assert tuned.execution_report().execution == "shared"


def test_a_bank_of_roberta_follows_its_forward(roberta: Any) -> None:
    ids, mask = rows()
    expected = by_forward(roberta, ids, mask)
    bank = PromptBank(roberta)
    for name, tokens in prompt_tokens().items():
        bank.add(name, roberta.get_input_embeddings()(tokens).detach())
    texts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
    with bank.use(ROWS) as view:
        assert torch.equal(Engine(bank).generate(view, texts, ROWS, dict(GREEDY)), expected)
    assert bank.uncompiled is None


def test_deep_prompts_of_roberta_begin_where_its_forward_begins(roberta: Any) -> None:
    ids, mask = rows()
    expected = by_forward(roberta, ids, mask)[1]
    tuned = spf.DeepPromptModel(roberta)
    tuned.add_prompt("long", 7, seed=1)
    plain = roberta(input_ids=ids[:1]).logits
    assert torch.allclose(tuned(ids, mask, prompt_ids=[None] * 4).logits[:1], plain, atol=1e-4)
    assert torch.equal(tuned.generate(ids[1:2], mask[1:2], [None], **GREEDY)[0, -NEW_TOKENS:], expected)


@pytest.mark.parametrize(
    "change", [{}, {"use_cache": True}, {"generation_config": tf.GenerationConfig(**GREEDY, num_beams=1)}]
)
def test_text_of_prophetnet_follows_its_forward(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2)
    sizes |= dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "hidden_size": 32, "vocab_size": 96}
    config = tf.ProphetNetConfig(**sizes, max_position_embeddings=128, decoder_start_token_id=2)
    model = spread(tf.ProphetNetForConditionalGeneration(config))
    model.generation_config.eos_token_id = None
    texts = torch.randint(6, 90, (16, 5))
    decoder = torch.full((16, 1), 2)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=texts, decoder_input_ids=decoder, use_cache=False).logits
        decoder = torch.cat([decoder, logits[:, -1].argmax(-1, keepdim=True)], 1)
    settings = GREEDY | {"num_beams": 1}
    assert not torch.equal(model.generate(texts, **settings), decoder)  # else the model needs no special case
    options = change if "generation_config" in change else settings | change
    assert torch.equal(with_real_prompts(model).generate(texts, prompt_ids=[None] * 16, **options), decoder)
