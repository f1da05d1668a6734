"""Shared-prompt execution: exact on every architecture that it supports; all others use the padded layout."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.rows_alone import ROWS, alone, relative, tuned_model
from support.tiny_models import DECODERS, ENCODERS, LLAMA, WINDOW, batch, build, changes_mask, own_attention

import softprompt_fast as spf
from softprompt_fast.packed.runner import PackedRunner

OWN_ATTENTION = [name for name in DECODERS if own_attention(name)]
FALLBACK = {*OWN_ATTENTION, *filter(changes_mask, DECODERS)}
SHARED = [name for name in DECODERS if name not in FALLBACK]


@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients_equal_each_row_alone(name: str, padding: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch(padding=padding)
    labels = torch.where(torch.rand(ids.shape) < 0.5, ids, -100).masked_fill(mask == 0, 7)
    output = tuned(ids, mask, labels=labels, prompt_ids=ROWS, return_logits=True)
    output.loss.backward()
    assert tuned.execution_report().execution == ("padded" if name in FALLBACK else "shared")

    losses, count, parts = [], 0, []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, used = alone(tuned, ids[row][real], prompt)
        assert relative(output.logits[row][real], expected.logits[0, len(used) :]) < 1e-5
        assert not output.logits[row][~real].any()
        target = torch.cat([torch.full((len(used),), -100), labels[row][real]])[1:]
        losses.append(torch.nn.functional.cross_entropy(expected.logits[0, :-1], target, reduction="sum"))
        count += int((target != -100).sum())
        parts.append((prompt, used))
    loss = torch.stack(losses).sum() / count
    loss.backward()
    assert relative(output.loss, loss) < 1e-5
    for prompt in ("short", "long"):
        wanted = sum(used.grad for owner, used in parts if owner == prompt)
        got = tuned.prompts[prompt].grad
        assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_next_token_logits_hidden_states_and_logits_where_they_are_read(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    whole = tuned(ids, mask, prompt_ids=ROWS, output_hidden_states=True)
    last = torch.stack([whole.logits[row][mask[row].bool()][-1] for row in range(len(ids))])
    assert relative(tuned.next_token_logits(ids, mask, ROWS), last) < 1e-5
    assert {tuple(s.shape) for s in whole.hidden_states} == {(*ids.shape, 32)}
    padded = spf.SoftPromptModel(tuned.base_model, tuned.prompts, execution="padded")
    expected = padded(ids, mask, prompt_ids=ROWS, output_hidden_states=True)
    assert all(relative(a, b) < 1e-5 for a, b in zip(whole.hidden_states, expected.hidden_states, strict=True))
    trained = tuned(ids, mask, labels=ids, prompt_ids=ROWS)
    assert trained.logits is None
    assert relative(trained.loss, tuned(ids, mask, labels=ids, prompt_ids=ROWS, return_logits=True).loss) < 1e-6


def test_the_packed_batch_holds_useful_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    seen: list[torch.Size] = []
    monkeypatch.setattr(tuned.runner, "check", False)
    monkeypatch.setattr(tuned.base_model.model, "forward", _spy(tuned.base_model.model.forward, seen))
    tuned(ids, mask, labels=ids, prompt_ids=ROWS)
    assert seen == [torch.Size([1, 7 + 2 + int(mask.sum()), 32])]


def _spy(function: Any, seen: list[torch.Size]) -> Any:
    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["inputs_embeds"].shape)
        return function(*args, **kwargs)

    return spy


@pytest.mark.parametrize("labelled", [False, True])
def test_text_that_rows_share_runs_once_and_changes_nothing(labelled: bool) -> None:
    tuned = tuned_model("llama")
    plain = spf.SoftPromptModel(tuned.base_model, tuned.prompts, shared_text=None)
    ids, mask = batch(rows=5, tokens=14, padding="left")
    rows = ["long", "long", "short", None, "short"]
    shared_part = torch.tensor([5, 6, 7, 8])
    for row in range(5):
        ids[row, mask[row].argmax() :][:4] = shared_part
    labels = ids if labelled else None
    outputs = [model(ids, mask, labels=labels, prompt_ids=rows, return_logits=True) for model in (tuned, plain)]
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    packs = [m.runner.pack(m.prompts.select(rows, len(ids)), ids, mask, None).layout.slots for m in (tuned, plain)]
    assert packs[1] - packs[0] == 4 * 2  # one copy of four tokens instead of two, for each of two prompts
    if labelled:
        grads = [torch.autograd.grad(o.loss, [tuned.prompts["long"], tuned.prompts["short"]]) for o in outputs]
        assert relative(outputs[0].loss, outputs[1].loss) < 1e-6
        assert all(relative(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def test_identical_rows_keep_a_token_of_their_own() -> None:
    tuned = tuned_model("llama")
    ids = torch.randint(3, 90, (1, 6)).expand(3, -1)
    logits = tuned(ids, prompt_ids="long").logits
    expected, used = alone(tuned, ids[0], "long")
    assert all(relative(row, expected.logits[0, len(used) :]) < 1e-5 for row in logits)


def test_empty_rows_and_rows_without_labels() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    mask[1] = 0
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    expected, used = alone(tuned, ids[2][mask[2].bool()], ROWS[2])
    assert relative(logits[2][mask[2].bool()], expected.logits[0, len(used) :]) < 1e-5
    assert not logits[1].any()


@pytest.mark.parametrize(("name", "keyword"), [("gemma2", "softcap"), ("gpt-oss", "s_aux")])
def test_soft_caps_and_sinks_of_eager_models(name: str, keyword: str) -> None:
    if name == "gpt-oss":
        config = tf.GptOssConfig(**LLAMA, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = tf.Gemma2Config(**LLAMA, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, 0, 0.25)
    tuned = spf.SoftPromptModel(model)
    for prompt, length in {"short": 2, "long": 7}.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32))
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    assert tuned.execution_report().execution == "shared", tuned.execution_report()
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, used = alone(tuned, ids[row][real], prompt)
        assert relative(logits[row][real], expected.logits[0, len(used) :]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    tuned = tuned_model("llama", dtype=dtype)
    exact = spf.SoftPromptModel(build("llama"), tuned.prompts, execution="padded")
    ids, mask = batch()
    tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
    assert tuned.execution_report().execution == "shared"
    got = tuned.prompts["long"].grad.clone()
    tuned.prompts.zero_grad()
    exact(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
    assert torch.nn.functional.cosine_similarity(got.flatten(), exact.prompts["long"].grad.flatten(), 0) > 0.99


def test_autocast() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    loss.backward()
    assert tuned.execution_report().execution == "shared"
    assert tuned.prompts["long"].grad.isfinite().all()


def test_gradient_checkpointing() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    grads = []
    for reentrant in (None, False, True):
        tuned.train()
        if reentrant is not None:
            tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned.zero_grad()
        tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
        other, other_mask = batch(rows=3, tokens=5)  # another batch in between must not disturb a recomputation
        tuned(other, other_mask, prompt_ids="short")
        grads.append(tuned.prompts["long"].grad.clone())
    assert tuned.execution_report().execution == "shared"
    assert relative(grads[1], grads[0]) < 1e-5 and relative(grads[2], grads[0]) < 1e-5


def test_two_batches_before_their_backward() -> None:
    tuned = tuned_model("llama")
    (a, a_mask), (b, b_mask) = batch(), batch(rows=2, tokens=6)
    first = tuned(a, a_mask, labels=a, prompt_ids=ROWS).loss
    second = tuned(b, b_mask, labels=b, prompt_ids="long").loss
    (together,) = torch.autograd.grad(first + second, [tuned.prompts["long"]])
    one = torch.autograd.grad(tuned(a, a_mask, labels=a, prompt_ids=ROWS).loss, [tuned.prompts["long"]])[0]
    two = torch.autograd.grad(tuned(b, b_mask, labels=b, prompt_ids="long").loss, [tuned.prompts["long"]])[0]
    assert relative(together, one + two) < 1e-6


def test_compiled_base_model() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    expected = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    tuned.base_model.model = torch.compile(tuned.base_model.model, backend="aot_eager", dynamic=True)
    loss = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    loss.backward()
    assert relative(loss, expected) < 1e-6 and tuned.execution_report().execution == "shared"


def test_host_counts_give_the_same_result() -> None:
    tuned = tuned_model("llama")
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    counted = {"lengths": mask.sum(1).tolist(), "num_targets": int((labels != -100).sum())}
    with_counts = tuned(ids, mask, labels=labels, prompt_ids=ROWS, **counted).loss
    assert torch.equal(with_counts, tuned(ids, mask, labels=labels, prompt_ids=ROWS).loss)


@pytest.mark.parametrize("model", ["plain", "deep"])
def test_use_cache_false_changes_nothing(model: str) -> None:
    tuned = tuned_model("llama") if model == "plain" else deep_model("llama")
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS, use_cache=False).logits
    assert tuned.execution_report().execution == "shared"
    assert torch.equal(logits, tuned(ids, mask, prompt_ids=ROWS).logits)


# --- falling back to the padded layout ---


@pytest.mark.parametrize("name", [*OWN_ATTENTION, *ENCODERS, "t5"])
def test_what_cannot_share_says_why(name: str) -> None:
    report = spf.SoftPromptModel(build(name)).execution_report()
    assert report.execution == "padded" and len(report.reason) > 20
    with pytest.raises(ValueError, match="execution='shared' is not exact for this model"):
        spf.SoftPromptModel(build(name), execution="shared")


def test_a_model_that_mixes_neighbours_is_found_by_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    tuned = tuned_model("llama")
    layer = tuned.base_model.model.layers[1].mlp
    original = layer.forward

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return original(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])

    layer.forward = shifted
    ids, mask = batch()
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        logits = tuned(ids, mask, prompt_ids=ROWS).logits
        tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().execution == "padded"
    assert sum("differ from row-by-row logits" in record.message for record in caplog.records) == 1
    expected, used = alone(tuned, ids[0], ROWS[0])
    assert relative(logits[0], expected.logits[0, len(used) :]) < 1e-5


def test_a_layer_without_attention_is_found_by_counting() -> None:
    tuned = tuned_model("llama")
    tuned.runner.check = False
    attention = tuned.base_model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    ids, mask = batch()
    tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().reason == "2 attention calls in 3 layers"


def test_an_unknown_keyword_is_never_guessed() -> None:
    tuned = tuned_model("llama")
    tuned.runner.check = False
    attention = tuned.base_model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, novelty=1.0, **kwargs)
    ids, mask = batch()
    tuned(ids, mask, prompt_ids=ROWS)
    assert "novelty" in tuned.execution_report().reason


def test_after_falling_back_the_model_is_as_it_was() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    runner = PackedRunner(model)
    assert model.config._attn_implementation != before
    runner.give_up("asked to")
    assert model.config._attn_implementation == before


def test_the_base_model_itself_is_not_changed_by_sharing() -> None:
    ids, mask = batch(padding="left")
    expected = build("llama")(input_ids=ids, attention_mask=mask).logits
    model = build("llama")
    spf.SoftPromptModel(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`execution` must be one of auto, shared, padded, got 'fast'"):
        spf.SoftPromptModel(build("llama"), execution="fast")
    tuned = tuned_model("llama")
    with pytest.raises(ValueError, match=r"`labels` must have the shape of input_ids \[4, 11\], got \[4, 3\]"):
        tuned(*batch(), labels=torch.ones(4, 3, dtype=torch.long), prompt_ids=ROWS)


@pytest.mark.parametrize("what", ["id", "additive mask", "id in shared text"])
def test_bad_input_is_the_callers_error_and_not_a_reason_to_fall_back(what: str) -> None:
    tuned = tuned_model("llama")
    ids, mask = torch.randint(3, 90, (3, 6)), torch.ones(3, 6)
    ids[:, :3] = torch.tensor([5, 6, 7])
    if what == "additive mask":
        mask = torch.full((3, 6), -1.0)  # as additive masks mark padding: all of it
        expected: Any = pytest.raises(ValueError, match="`attention_mask` must hold 1 for tokens and 0 for padding")
    else:
        ids[:, 1 if what == "id in shared text" else 5] = 1000
        expected = pytest.raises(IndexError, match="`input_ids` must be 0 to 95, got 1000")
    with expected:
        tuned(ids, mask, prompt_ids="long")
    assert tuned.execution_report().execution == "shared"
    assert tuned(torch.randint(3, 90, (3, 6)), prompt_ids="long").logits.isfinite().all()


def test_the_comparison_leaves_every_modules_mode_alone() -> None:
    tuned = tuned_model("llama")
    tuned.train()
    tuned.base_model.model.layers[1].eval()
    before = [module.training for module in tuned.modules()]
    tuned(*batch(), prompt_ids=ROWS)
    assert [module.training for module in tuned.modules()] == before
