"""Deep prompts: trained keys and values of every layer; each row equals the row alone on a cache of its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deep_rows_alone import LENGTHS, deep_alone, deep_model
from support.rows_alone import ROWS, relative
from support.tiny_models import DECODERS, batch, build, own_attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

import softprompt_fast as spf
from softprompt_fast.prompts.peft_files import read_prompt

NAMES = ["llama", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_each_row_alone(name: str) -> None:
    tuned = deep_model(name)
    ids, mask = batch()
    with torch.no_grad():
        logits = tuned(ids, mask, prompt_ids=ROWS).logits
        last = tuned.next_token_logits(ids, mask, ROWS)
        places = torch.stack([torch.arange(len(ids)), mask.argmax(1)], 1)
        first = tuned.logits_at(ids, mask, ROWS, places)
        for row, prompt in enumerate(ROWS):
            real = mask[row].bool()
            expected = deep_alone(tuned, ids[row][real], None if prompt is None else tuned.prompts[prompt])
            assert relative(logits[row][real], expected) < 1e-5
            assert relative(last[row], expected[-1]) < 1e-5
            assert relative(first[row], expected[0]) < 1e-5
            assert not logits[row][~real].any()
    assert tuned.execution_report().execution == "shared" and "inference" in tuned.execution_report().checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_each_row_alone(name: str, dtype: torch.dtype) -> None:
    tuned = deep_model(name, dtype)
    ids, mask = batch()
    labels = torch.where(torch.rand(ids.shape) < 0.6, ids, -100).masked_fill(mask == 0, 7)
    output = tuned(ids, mask, labels=labels, prompt_ids=ROWS)
    output.loss.backward()
    used = {prompt: tuned.prompts[prompt].detach().clone().requires_grad_() for prompt in LENGTHS}
    losses, count = [], 0
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        logits = deep_alone(tuned, ids[row][real], None if prompt is None else used[prompt])
        target = labels[row][real][1:]
        losses.append(nn.functional.cross_entropy(logits[:-1], target, reduction="sum"))
        count += int((target != -100).sum())
    expected = torch.stack(losses).sum() / count
    expected.backward()
    assert relative(output.loss, expected) < 1e-5
    for prompt, values in used.items():
        got = tuned.prompts[prompt].grad
        assert ((got - values.grad).norm() / values.grad.norm()).item() < 1e-5
    assert "training" in tuned.execution_report().checked


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_started_from_a_plain_prompt_it_answers_as_that_prompt(name: str, tmp_path: Path) -> None:
    plain = spf.SoftPromptModel(build(name))
    plain.add_prompt("mine", init=torch.randn(4, plain.prompts.embedding_dim) * 0.5)
    plain.save_pretrained(tmp_path)
    tuned = spf.DeepPromptModel(plain.base_model)
    added = tuned.add_prompt("mine", init=plain.prompts["mine"].detach())
    assert torch.equal(added, tuned.add_prompt("file", init=tmp_path / "mine"))
    ids, mask = batch()
    expected = plain(ids, mask, prompt_ids="mine").logits
    assert relative(tuned(ids, mask, prompt_ids="mine").logits, expected) < 1e-5


class Words:
    """A tokenizer of three words."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [5, 6, 7][: len(text.split())]})


def test_every_way_to_start() -> None:
    tuned = spf.DeepPromptModel(build("gpt2"))
    tuned.base_model.train()  # its dropout must not reach the initial values
    plain = spf.SoftPromptModel(build("gpt2"))
    ids = torch.tensor([[9, 8, 7]])
    for init, given in [
        ("random", {"num_virtual_tokens": 3, "seed": 1}),
        ("vocabulary", {"num_virtual_tokens": 3, "seed": 1}),
        ("text", {"init_text": "a b c", "tokenizer": Words()}),
        ("class_labels", {"class_labels": ["a", "a b"], "tokenizer": Words(), "num_virtual_tokens": 2}),
    ]:
        for model in (tuned, plain):
            model.add_prompt(f"by_{init}", init=init, **given)
        got = tuned.eval()(ids, prompt_ids=f"by_{init}").logits
        assert relative(got, plain(ids, prompt_ids=f"by_{init}").logits) < 1e-5
        tuned.train()
    copy = tuned.add_prompt("copy", init="by_text")
    assert torch.equal(copy, tuned.prompts["by_text"]) and copy is not tuned.prompts["by_text"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3", "mistral-window"])
def test_peft_reads_ours_and_we_read_peft(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = deep_model(name)
    tuned.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 9))
    ours = tuned(ids, prompt_ids="long").logits
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "long").eval()
    theirs.base_model.config.use_cache = True
    with torch.no_grad():
        assert relative(theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, ours) < 1e-5

    for folder, options in [("projected", {"prefix_projection": True, "encoder_hidden_size": 16}), ("theirs", {})]:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
        made = peft.get_peft_model(build(name), config).eval()
        with torch.no_grad():
            made.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
            expected = made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        made.save_pretrained(tmp_path / folder)
        tuned.load_prompt(tmp_path / folder)
        assert relative(tuned(ids, prompt_ids=folder).logits, expected) < 1e-5
    assert torch.equal(tuned.add_prompt("again", init=tmp_path / "theirs"), tuned.prompts["theirs"])
    ours_written, theirs_written = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("long", "theirs")
    )
    fields = ["num_layers", "num_attention_heads", "token_dim", "encoder_hidden_size", "num_transformer_submodules"]
    assert [ours_written[f] for f in fields] == [theirs_written[f] for f in fields]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tuned = deep_model("llama")
    tuned.save_pretrained(tmp_path)
    again = spf.DeepPromptModel.from_pretrained(build("llama"), tmp_path)
    ids, mask = batch()
    assert torch.equal(again(ids, mask, prompt_ids=ROWS).logits, tuned(ids, mask, prompt_ids=ROWS).logits)
    fresh = spf.DeepPromptModel(tuned.base_model)
    fresh.prompts.load_state_dict(tuned.prompts.state_dict())
    assert torch.equal(fresh.prompts["long"], tuned.prompts["long"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_a_few_steps_reduce_the_loss(name: str) -> None:
    model = build(name)
    tuned = spf.DeepPromptModel(model)
    tuned.add_prompt("mine", 5, init="vocabulary", seed=0)
    tuned.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(tuned.prompts.parameters(), lr=0.1)
    ids, mask = batch()
    losses = []
    for _ in range(15):
        loss = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids="mine").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_gradients_pass_checkpointing_autocast_and_low_precision() -> None:
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)

    def gradient(tuned: spf.DeepPromptModel, autocast: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tuned(ids, mask, labels=labels, prompt_ids=ROWS).loss.backward()
        assert tuned.prompts["long"].grad.dtype == torch.float32
        return tuned.prompts["long"].grad

    torch.manual_seed(3)
    expected = gradient(deep_model("llama"))
    torch.manual_seed(3)
    checkpointed = deep_model("llama")
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    assert relative(gradient(checkpointed), expected) < 1e-5
    torch.manual_seed(3)
    rounded = gradient(deep_model("llama", torch.bfloat16))
    assert nn.functional.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0) > 0.98
    torch.manual_seed(3)
    rounded = gradient(deep_model("llama"), autocast=True)
    assert nn.functional.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0) > 0.98


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


def test_a_prompt_may_be_computed_from_its_parameter() -> None:
    tuned = deep_model("llama")
    values = tuned.prompts["long"].detach().clone()
    parametrize.register_parametrization(tuned.prompts, "prompt_long", Doubled())
    ids, mask = batch()
    tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS).loss.backward()
    got = tuned.prompts.parametrizations.prompt_long.original.grad
    tuned.add_prompt("computed", init=2 * values)
    rows = [{"long": "computed"}.get(row, row) if row else None for row in ROWS]
    tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=rows).loss.backward()
    assert relative(got, 2 * tuned.prompts["computed"].grad) < 1e-5
    assert tuned.execution_report().checked["training"] < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "gemma3"])
def test_generate_equals_each_row_alone(name: str, options: dict[str, Any]) -> None:
    tuned = deep_model(name)
    ids, mask = batch()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    together = tuned.generate(ids, mask, ROWS, **options)
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(together[:, : ids.shape[1]], ids.repeat_interleave(copies, 0))
    for row, prompt in enumerate(ROWS):
        real = ids[row][mask[row].bool()]
        got = together[row * copies : (row + 1) * copies, ids.shape[1] :]
        single = tuned.generate(real[None], None, [prompt], **options)
        assert torch.equal(got, single[:, len(real) :])
        if "num_beams" not in options:  # and alone means alone: step by step, without a cache
            text = real
            for token in got[0]:
                values = None if prompt is None else tuned.prompts[prompt]
                assert deep_alone(tuned, text, values)[-1].argmax() == token
                text = torch.cat([text, token[None]])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_generate_where_prompts_are_gathered(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = deep_model(name)
    ids, mask = batch()
    mask[2], mask[2, -1] = 0, 1  # a row of one token
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    expected = tuned.generate(ids, mask, ROWS, **options)
    single = ids[:, -1:]
    expected_single = tuned.generate(single, None, ROWS, **options)
    gathered = spf.DeepPromptModel(tuned.base_model, tuned.prompts)
    monkeypatch.setattr("softprompt_fast.compiled.cache.available", lambda query: False)
    assert torch.equal(gathered.generate(ids, mask, ROWS, **options), expected)
    assert torch.equal(gathered.generate(single, None, ROWS, **options), expected_single)
    wider = torch.cat([torch.full((4, 9), 5), ids], 1)  # columns that are padding in every row
    padded = gathered.generate(wider, torch.cat([torch.zeros_like(wider[:, :9]), mask], 1), ROWS, **options)
    assert torch.equal(padded[:, 9:], expected)


def test_texts_of_no_or_few_tokens() -> None:
    tuned = deep_model("llama")
    ids, mask = batch()
    mask[1] = 0
    mask[2] = 0
    mask[2, 4] = 1
    output = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    assert output.loss.isfinite() and not output.logits[1].any()
    assert relative(output.logits[2, 4], deep_alone(tuned, ids[2, 4:5], tuned.prompts["short"])[0]) < 1e-5
    with pytest.raises(ValueError, match="`input_ids` must hold a token in each row"):
        tuned.next_token_logits(ids, mask, ROWS)


@pytest.mark.parametrize("name", [*filter(own_attention, DECODERS), "t5", "bert"])
def test_models_that_cannot_run_packed_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="cannot run deep prompts: "):
        spf.DeepPromptModel(build(name))


def test_a_failed_check_raises_and_goes_on_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = deep_model("llama")
    true = tuned.runner.logits_alone
    monkeypatch.setattr(tuned.runner, "logits_alone", lambda *args, **options: true(*args, **options) * 1.5)
    ids, mask = batch()
    for _ in range(2):
        with pytest.raises(TypeError, match="LlamaForCausalLM cannot run deep prompts: packed logits differ from"):
            tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().execution == "refused"


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    tuned = deep_model("llama")
    ids, _ = batch()
    with pytest.raises(ValueError, match=r"must have shape \[P, 32\] \(a plain prompt\) or \[P, 96\], got \[2, 33\]"):
        tuned.add_prompt("wrong", init=torch.zeros(2, 33))
    with pytest.raises(ValueError, match="`output_attentions` cannot be given: deep prompts run in"):
        tuned(ids, prompt_ids="long", output_attentions=True)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must be PROMPT_TUNING, .* or CPT, got 'PREFIX_TUNING', which DeepPromptModel reads"
    ):
        spf.SoftPromptModel(build("llama")).load_prompt(tmp_path / "long")
    with pytest.raises(ValueError, match=r"must be for .* = \[3, 4, 32\] like the model, got \[3, 2, 16\]"):
        spf.DeepPromptModel(build("gpt2")).load_prompt(tmp_path / "long", force=True)
    plain = spf.SoftPromptModel(build("llama"))
    plain.add_prompt("plain", 2)
    plain.save_pretrained(tmp_path)
    assert read_prompt(tmp_path / "plain")[0].shape == (2, 32)
    with pytest.raises(
        ValueError, match="must be PREFIX_TUNING or CARTRIDGE, got 'PROMPT_TUNING', which SoftPromptModel reads"
    ):
        tuned.load_prompt(tmp_path / "plain")
