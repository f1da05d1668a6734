"""Models that look up ids in a way of their own, or read padding: a scale is found and used, anything else refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as tf
from support.rows_alone import relative
from support.tiny_models import BART, LLAMA, batch

import softprompt_fast as spf
from softprompt_fast.hf.embedding import embedding_table
from softprompt_fast.inference.engine import Engine
from softprompt_fast.inference.prompt_bank import PromptBank

ROWS = ["mine", None, "mine", None]


def scaled_pegasus() -> Any:
    torch.manual_seed(0)
    values = {key: value for key, value in BART.items() if key != "forced_eos_token_id"}
    model = tf.PegasusForConditionalGeneration(tf.PegasusConfig(**values, scale_embedding=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


class EmbedsInItsOwnWay(tf.LlamaForCausalLM):
    """Changes embeddings only if it is given ids."""

    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None, **options: Any
    ) -> Any:
        self.runs = getattr(self, "runs", 0) + 1
        if inputs_embeds is None:
            inputs_embeds = self.changed(self.get_input_embeddings()(input_ids))
        return super().forward(inputs_embeds=inputs_embeds, position_ids=position_ids, **options)


class ScalesForCausalLM(EmbedsInItsOwnWay):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.input_scale = 3.0

    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * self.input_scale


class Adds(EmbedsInItsOwnWay):
    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors + 0.5


class Normalises(EmbedsInItsOwnWay):
    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(vectors, vectors.shape[-1:])


def of(kind: type) -> Any:
    torch.manual_seed(0)
    model = kind(tf.LlamaConfig(**LLAMA, initializer_range=0.25))
    return model.eval()


def test_a_scale_that_the_model_applies_to_ids_only_is_used_for_texts() -> None:
    model = scaled_pegasus()
    ids, mask = batch()
    extra = {"decoder_input_ids": ids[:, :3]}
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("mine", init=torch.randn(4, 32) * 0.5)
    logits = tuned(ids, mask, prompt_ids=ROWS, **extra).logits
    for row, prompt in enumerate(ROWS):
        text = ids[row][mask[row].bool()][None]
        single = {key: value[row : row + 1] for key, value in extra.items()}
        vectors = model.get_input_embeddings()(text) * 32**0.5
        used = tuned.prompts["mine"][None] if prompt else vectors[:, :0]
        expected = model(inputs_embeds=torch.cat([used, vectors], 1), **single).logits[0]
        if prompt is None:
            assert relative(expected, model(input_ids=text, **single).logits[0]) < 1e-5
        assert relative(logits[row], expected) < 1e-5


def test_the_scale_reaches_every_user_of_the_table() -> None:
    model = of(ScalesForCausalLM)
    tuned = spf.SoftPromptModel(model)
    table = embedding_table(model.get_input_embeddings())
    assert table.scale == 3.0
    added = tuned.add_prompt("vocabulary", 5, init="vocabulary", seed=0)
    nearest = (added[:, None] - 3.0 * model.get_input_embeddings().weight).abs().amax(-1).amin(1)
    assert (nearest < 1e-6).all()
    ids, mask = batch()
    rows: list[str | None] = [None] * len(ids)
    texts = [ids[row][mask[row].bool()] for row in range(len(ids))]
    expected = torch.stack([model(input_ids=text[None]).logits[0, -1] for text in texts])
    padded = spf.SoftPromptModel(model, tuned.prompts, execution="padded")
    for wrapped in (tuned, padded, spf.DeepPromptModel(model)):
        assert relative(wrapped.next_token_logits(ids, mask, rows), expected) < 1e-5
    bank = PromptBank(tuned)
    names = ["vocabulary", *rows[1:]]
    with bank.use(names) as view, torch.no_grad():
        last = torch.tensor([[row, len(text) - 1] for row, text in enumerate(texts)])
        got = Engine(bank).logits_at(view, [text.tolist() for text in texts], names, last)
    assert bank.compiled == ["vocabulary"] and bank.uncompiled is None
    assert relative(got[1:], expected[1:]) < 1e-5


@pytest.mark.parametrize("kind", [Adds, Normalises])
def test_what_is_no_scale_is_refused_with_the_difference(kind: type) -> None:
    with pytest.raises(
        TypeError, match=rf"{kind.__name__} cannot use a prompt: it treats embeddings .* differ from .* by"
    ):
        spf.SoftPromptModel(of(kind))


def test_a_model_that_cannot_run_on_vectors_is_refused() -> None:
    class NeedsIds(EmbedsInItsOwnWay):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **options: Any) -> Any:
            return super().forward(input_ids.clone(), None, **options)

    with pytest.raises(TypeError, match=r"runs on input_ids but not on inputs_embeds \(AttributeError"):
        spf.SoftPromptModel(of(NeedsIds))


def test_a_model_that_reads_padding_is_refused() -> None:
    class ReadsPadding(EmbedsInItsOwnWay):
        def forward(
            self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, **options: Any
        ) -> Any:
            output = super().forward(input_ids, inputs_embeds, attention_mask=attention_mask, **options)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    with pytest.raises(TypeError, match="ReadsPadding cannot use prompts in batches: a row beside a longer"):
        spf.SoftPromptModel(of(ReadsPadding))


def test_the_comparison_is_made_once_and_leaves_the_model_as_it_was() -> None:
    model = of(ScalesForCausalLM).train()
    model.model.layers[0].eval()
    torch.manual_seed(5)
    spf.SoftPromptModel(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    runs = model.runs
    assert model.training and not model.model.layers[0].training
    spf.SoftPromptModel(model)
    assert model.runs == runs
    assert list(of(ScalesForCausalLM).state_dict()) == list(model.state_dict())


def test_a_base_in_peft_has_its_scale() -> None:
    model = scaled_pegasus()
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q_proj"])
    tuned = spf.SoftPromptModel(peft.get_peft_model(model, config))
    ids, mask = batch()
    got = tuned(ids, mask, prompt_ids=[None] * 4, decoder_input_ids=ids[:, :3]).logits
    assert relative(got[0], model(input_ids=ids[:1], decoder_input_ids=ids[:1, :3]).logits[0]) < 1e-5
