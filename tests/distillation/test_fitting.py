"""Keys and values that are fitted to the attention to a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, compressed, queries
from torch import Tensor
from transformers import DynamicCache

import softprompt_fast as spf
from softprompt_fast.base.errors import Unsupported
from softprompt_fast.compiled.compile import compile_prompts, flattened, layered
from softprompt_fast.distillation import fitting
from softprompt_fast.distillation.fitting import fitted_values
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.teacher import Teacher
from softprompt_fast.distillation.training import batch_loss
from softprompt_fast.tasks.encoding import token_ids

MODELS = ["llama", "qwen3", "gemma3", "mistral-window", "gpt2", "gpt-neox"]
ROTARY = ["llama", "qwen3", "smollm3", "gpt-neox"]
COUNT = 6


def text_ids() -> list[int]:
    return token_ids(tiny_tokenizer(), TEXT)


def rows() -> list[list[int]]:
    return [token_ids(tiny_tokenizer(), TEMPLATE.format(**row)) for row in queries(12)]


def text_states(student: spf.DeepPromptModel, first: int = 0) -> Tensor:
    """[L, 2, T, H', E]"""
    vectors = student.get_input_embeddings()(torch.tensor(text_ids())).detach()
    return compile_prompts(student.runner, [vectors], first)


def states(student: spf.DeepPromptModel, values: Tensor) -> Tensor:
    return layered(values, student.runner.shape)


@pytest.fixture
def no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are the text's own."""
    monkeypatch.setattr(fitting, "BIAS_UPDATES", 0)


class FirstAttention:
    """What the first layer's attention, before its output projection, gives to all rows after a prompt."""

    def __init__(self, name: str) -> None:
        self.student = spf.DeepPromptModel(build(name), check=False)
        model = self.student.base_model
        layer = (
            model.gpt_neox.layers[0].attention.dense if name == "gpt-neox" else model.model.layers[0].self_attn.o_proj
        )
        layer.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0][0]))
        self.seen: list[Tensor] = []
        longest = max(len(row) for row in rows())
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows()])
        self.mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows()])

    def error(self, values: Tensor, whole: Tensor) -> tuple[float, Tensor]:
        """The squared difference of what two prompts [N, W] and [T, W] give, and its gradient [L, 2, N, H', E]."""
        self.seen.clear()
        parameters = []
        for one in (values, whole):
            parameters.append(self.student.add_prompt(f"prompt-{len(self.student.prompts)}", init=one))
            self.student(self.ids, self.mask, prompt_ids=self.student.prompts.names[-1])
        squared = (self.seen[0] - self.seen[1]).square().sum()
        (gradient,) = torch.autograd.grad(squared, parameters[:1])
        return squared.item(), states(self.student, gradient)


@pytest.mark.parametrize("name", MODELS)
def test_as_many_positions_as_the_text_are_the_text(name: str) -> None:
    student = spf.DeepPromptModel(build(name))
    found = fitted_values(student, text_ids(), len(text_ids()), rows())
    torch.testing.assert_close(found, flattened(text_states(student)), atol=1e-4, rtol=1e-3)
    settings = DistillationSettings(form="kv", new_tokens=5)
    targets = Teacher(student.base_model, tiny_tokenizer(), text_ids(), settings, None).targets(rows())
    student.add_prompt("whole", init=found)
    student.add_prompt("cut", init=found[:COUNT])
    whole, cut = (batch_loss(student, prompt, targets, 1.0).item() for prompt in ("whole", "cut"))
    assert whole < 1e-4 < 0.01 * cut


def places_in_text(keys: Tensor, text: Tensor) -> Tensor:
    """Places [L, H', N] of keys [L, N, H', E] among those of the text [L, T, H', E]."""
    kept, all_keys = keys.transpose(1, 2), text.transpose(1, 2)
    distances = torch.cdist(kept, all_keys, compute_mode="donot_use_mm_for_euclid_dist")
    places = distances.argmin(-1)
    assert distances.amin(-1).max() < 1e-4 and not places[..., 0].any() and (places.diff() > 0).all()
    return places


@pytest.mark.parametrize("name", ROTARY)
def test_fitted_values_have_the_least_squared_error_on_the_rows(name: str, no_bias: None) -> None:
    attention = FirstAttention(name)
    student = attention.student
    whole = flattened(text_states(student))
    text = text_states(student, COUNT - len(text_ids()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BIAS_UPDATES", 100)
        found = states(student, fitted_values(student, text_ids(), COUNT, rows()))
    unbiased = states(student, fitted_values(student, text_ids(), COUNT, rows()))
    places = places_in_text(unbiased[:, 0], text[:, 0])
    for fitted in (found, unbiased):
        own = fitted.clone()
        for layer, head in [(i, j) for i in range(len(own)) for j in range(own.shape[3])]:
            own[layer, 1, :, head] = text[layer, 1, places[layer, head], head]
        fitted_error, gradient = attention.error(flattened(fitted), whole)
        own_error, own_gradient = attention.error(flattened(own), whole)
        assert 0 < fitted_error < own_error
        assert gradient[0, 1].norm() < 0.05 * own_gradient[0, 1].norm()


@pytest.mark.parametrize(("name", "window", "bound"), [("llama", None, 0.4), ("mistral-window", 12, 0.6)])
def test_the_kept_keys_draw_as_much_attention_as_the_text(name: str, window: int | None, bound: float) -> None:
    """Against the attention weights of transformers, in the first layer, where queries do not depend on the prompt.

    As in trained models, query vectors have much in common: in the half of the dimensions that turn slowly.
    """
    model = build(name)
    model.config.sliding_window = window
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4.0
        model.model.layers[0].self_attn.q_proj.weight.view(4, 8, -1)[:, [2, 3, 6, 7], 0] = 1.0
    student = spf.DeepPromptModel(model)

    def drawn(found: Tensor) -> Tensor:
        shares = []
        for row in rows():
            cache = DynamicCache()
            for layer, (key, value) in enumerate(found.transpose(2, 3)):
                cache.update(key[None], value[None], layer)
            out = model(
                torch.tensor([row]),
                past_key_values=cache,
                position_ids=torch.arange(found.shape[2], found.shape[2] + len(row))[None],
                output_attentions=True,
            )
            shares.append(out.attentions[0][..., : found.shape[2]].sum(-1).flatten())
        return torch.cat(shares)

    def fitted() -> Tensor:
        return states(student, fitted_values(student, text_ids(), COUNT, rows()))

    whole, found = drawn(text_states(student)), fitted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BIAS_UPDATES", 0)
        unbiased = fitted()
    assert (drawn(found) - whole).norm() < bound * (drawn(unbiased) - whole).norm()
    moved = (found - unbiased)[:, 0].transpose(1, 2)
    strengths = torch.linalg.svdvals(moved)  # all keys of a head move along one direction
    assert (strengths[..., 0] > 0.01).all() and (strengths[..., 1] < 1e-3 * strengths[..., 0]).all()


def test_each_head_keeps_the_keys_with_the_largest_attention_of_its_group(no_bias: None) -> None:
    """Against the attention weights of transformers."""
    model = build("llama")
    model.set_attn_implementation("eager")
    student = spf.DeepPromptModel(model)
    squares = torch.zeros(3, 2, len(text_ids()))
    for row in rows():
        weights = model(torch.tensor([text_ids() + row]), output_attentions=True).attentions
        for layer, one in enumerate(weights):
            squares[layer] += one[0, :, len(text_ids()) :, : len(text_ids())].square().sum(1).view(2, 2, -1).sum(1)
    squares[..., 0] = torch.inf
    expected = squares.topk(COUNT).indices.sort(-1).values  # [L, H', N]
    found = states(student, fitted_values(student, text_ids(), COUNT, rows()))
    text = text_states(student, COUNT - len(text_ids()))
    for layer, head in [(i, j) for i in range(3) for j in range(2)]:
        keys = text[layer, 0, expected[layer, head], head]
        torch.testing.assert_close(found[layer, 0, :, head], keys, atol=1e-5, rtol=1e-4)
    assert not torch.equal(expected[:, 0], expected[:, 1])


def test_keys_of_absolute_positions_stay_at_their_places(no_bias: None) -> None:
    student = spf.DeepPromptModel(build("gpt2"))
    found = states(student, fitted_values(student, text_ids(), COUNT, rows()))
    places_in_text(found[:, 0], text_states(student)[:, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_first_position_can_keep_its_key_and_value(name: str) -> None:
    student = spf.DeepPromptModel(build(name))
    kept, free = (
        states(student, fitted_values(student, text_ids(), COUNT, rows(), keep_first=keep)) for keep in (True, False)
    )
    first = 0 if name == "gpt2" else COUNT - len(text_ids())
    torch.testing.assert_close(kept[:, :, 0], text_states(student, first)[:, :, 0], atol=1e-5, rtol=1e-4)
    value = text_states(student)[:, 1, 0]
    assert (free[:, 0, 0] - kept[:, 0, 0]).norm() > 0.01 * kept[:, 0, 0].norm()
    assert (free[:, 1, 0] - value).norm() > 0.01 * value.norm()
    assert (kept[:, 1, 1:] - free[:, 1, 1:]).norm() > 0.01 * free[:, 1, 1:].norm()


def test_a_compiled_model_gives_the_same_values() -> None:
    torch._dynamo.reset()
    student = spf.DeepPromptModel(build("llama"))
    expected = fitted_values(student, text_ids(), COUNT, rows())
    model = student.base_model
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(fitted_values(student, text_ids(), COUNT, rows()), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_auto_measures_fitted_values_of_keys_and_values(tmp_path: Path) -> None:
    options: dict[str, Any] = {"form": "kv", "steps": 1, "learning_rate": 1e-9}
    (prompt,) = compressed(tmp_path, **options).prompts
    assert set(prompt.init_losses) == {"text", "sampled", "pooled", "fitted"}
    assert prompt.init == "fitted" and prompt.init_losses["fitted"] == min(prompt.init_losses.values())
    same = compressed(tmp_path / "same", init="fitted", **options).prompts[0]
    assert same.retention.kl == pytest.approx(prompt.retention.kl, rel=1e-4)


def test_attention_with_a_soft_cap_has_no_fitted_values(tmp_path: Path) -> None:
    model = build("gemma2")
    model.set_attn_implementation("eager")
    with pytest.raises(Unsupported, match="its attention has soft caps or sinks"):
        fitted_values(spf.DeepPromptModel(model), text_ids(), COUNT, rows())
    message = "`init` fitted cannot be used with Gemma2ForCausalLM: its attention has soft caps or sinks"
    with pytest.raises(TypeError, match=message):
        compressed(tmp_path, model=model, form="kv", init="fitted")
    (prompt,) = compressed(tmp_path, model=model, form="kv", steps=1).prompts
    assert set(prompt.init_losses) == {"text", "sampled", "pooled"}
