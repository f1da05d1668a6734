"""Prompts together with LoRA and other adapters of PEFT in the same base: trained, switched, saved, refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.adapted_models import (
    KINDS,
    LORA,
    adapted,
    add_to_the_adapter,
    check_generated,
    trained,
    two_adapters,
    with_prompts,
)
from support.deep_rows_alone import deep_alone
from support.peft_models import IDS, fill
from support.rows_alone import PROMPTS, ROWS, relative
from support.tiny_models import batch, build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank
from softprompt_fast.prompts.base_identity import base_fingerprint

peft = pytest.importorskip("peft")

# --- numbers and gradients ---


@pytest.mark.parametrize("execution", ["shared", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_each_row_alone(kind: str, execution: str) -> None:
    base = adapted(kind)
    before = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    tuned = with_prompts(base, train_adapters=True, execution=execution)
    assert {name for name, parameter in base.named_parameters() if parameter.requires_grad} == before != set()
    torch.manual_seed(0)
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    assert tuned.execution_report().execution == execution
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    weights = torch.randn_like(logits)
    got = torch.autograd.grad((logits * weights * mask[..., None]).sum(), parameters, allow_unused=True)
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        vectors = tuned.get_input_embeddings()(ids[row][real][None])
        used = vectors[:, :0] if prompt is None else tuned.prompts[prompt][None]
        values = tuned.base_model(inputs_embeds=torch.cat([used, vectors], 1)).logits[0, used.shape[1] :]
        assert relative(logits[row][real], values) < 1e-5
        loss = (values * weights[row][real]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total += 0 if gradient is None else gradient
    reached = 0
    for a, b in zip(got, expected, strict=True):
        assert relative(torch.zeros_like(b) if a is None else a, b) < 5e-5
        reached += bool(b.norm() > 0)
    assert reached >= len(parameters) - 2  # the last layer's adapters of positions that nothing reads


def test_deep_prompts_on_an_adapter() -> None:
    tuned = spf.DeepPromptModel(adapted(), train_adapters=True)
    torch.manual_seed(3)
    for name, length in PROMPTS.items():
        tuned.add_prompt(name, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    ids, mask = batch()
    logits = tuned(ids, mask, prompt_ids=ROWS).logits
    weights = torch.randn_like(logits) * mask[..., None]
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(parameters) > len(PROMPTS)
    values = torch.zeros_like(logits)
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        values[row, real] = deep_alone(tuned, ids[row][real], None if prompt is None else tuned.prompts[prompt])
    assert relative(logits, values) < 1e-5
    got, expected = (torch.autograd.grad((each * weights).sum(), parameters) for each in (logits, values))
    for a, b in zip(got, expected, strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 5e-5


def test_the_self_check_leaves_out_the_dropout_of_adapters() -> None:
    tuned = with_prompts(adapted(lora_dropout=0.5), train_adapters=True).train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 and m.training for m in tuned.modules())
    ids, mask = batch()
    torch.manual_seed(1)
    first, second = (tuned(ids, mask, prompt_ids=ROWS, labels=ids).loss for _ in range(2))
    assert first != second  # dropout is active
    report = tuned.execution_report()
    assert (report.execution, report.checked["training"] < 1e-4) == ("shared", True)


@pytest.mark.parametrize("what", ["prompts", "adapter", "both"])
def test_prompts_or_the_adapter_or_both_are_trained(what: str) -> None:
    model = adapted()
    tuned = with_prompts(model, train_adapters=what != "prompts")
    if what == "adapter":
        for name in PROMPTS:
            tuned.prompts.freeze_prompt(name)
    kinds = {name.partition(".")[0] for name in trained(tuned)}
    assert kinds == {"prompts": {"prompts"}, "adapter": {"base_model"}, "both": {"prompts", "base_model"}}[what]
    assert all("lora_" in name for name in trained(tuned) if name.startswith("base_model"))
    before = {name: value.detach().clone() for name, value in tuned.named_parameters()}
    ids, mask = batch()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, value in tuned.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(trained(tuned))
    assert set(tuned.state_dict()) == {name for name in before if name.startswith("prompts.")} | {
        name for name in trained(tuned) if name.startswith("base_model.")
    }


def test_an_adapter_without_trainable_parameters_cannot_be_trained() -> None:
    model = adapted()
    model.requires_grad_(False)
    for base in (model, build("llama")):
        with pytest.raises(ValueError, match=r"`train_adapters` must be False because no parameter of an adapter is"):
            spf.SoftPromptModel(base, train_adapters=True)
    tuned = spf.DeepPromptModel(adapted(), train_adapters=True)
    assert any("lora_" in name for name in trained(tuned))


def test_what_was_trainable_is_trainable_after_unload() -> None:
    model = adapted()
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tuned = with_prompts(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tuned.unload()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before


# --- several adapters ---


@pytest.mark.parametrize("train", [False, True])
def test_switching_does_not_unfreeze(train: bool) -> None:
    model = two_adapters()
    tuned = with_prompts(model, train_adapters=train)
    tuned.set_adapter("other")
    assert model.active_adapter == "other"
    assert any(".other." in name for name in trained(tuned)) is train
    with tuned.disable_adapter():
        assert not any("lora_" in name for name in trained(tuned))
    assert any(".other." in name for name in trained(tuned)) is train
    model.set_adapter("default")  # PEFT's own method makes it trainable
    assert any(".default." in name for name in trained(tuned))
    tuned.set_adapter("default")
    assert any(".default." in name for name in trained(tuned)) is train
    plain = with_prompts(build("llama"))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapters"), plain.disable_adapter():
        pass


def test_disabled_adapters_leave_the_base_with_its_prompts() -> None:
    tuned, plain = with_prompts(two_adapters()), with_prompts(build("llama"))
    ids, mask = batch()
    expected = plain(ids, mask, prompt_ids=ROWS).logits
    assert relative(tuned(ids, mask, prompt_ids=ROWS).logits, expected) > 1e-2
    with tuned.disable_adapter():
        assert relative(tuned(ids, mask, prompt_ids=ROWS).logits, expected) < 1e-5


def test_transformers_own_adapters() -> None:
    model = build("llama")
    model.add_adapter(peft.LoraConfig(**LORA), "one")
    tuned = with_prompts(model.eval())
    assert trained(tuned) == ["prompts.prompt_short", "prompts.prompt_long"]
    with_adapter = check_generated(tuned)
    with tuned.disable_adapter():
        assert check_generated(tuned) == check_generated(with_prompts(build("llama"))) != with_adapter
    assert check_generated(tuned) == with_adapter
    assert trained(tuned) == ["prompts.prompt_short", "prompts.prompt_long"]


def test_peft_mixed_models() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["v_proj"], init_weights=False))
    tuned = with_prompts(model.eval())
    tuned.set_adapter(["default", "second"])
    report = check_generated(tuned), tuned.execution_report().execution
    assert report[1] == "shared"
    with tuned.disable_adapter():
        assert check_generated(tuned) == check_generated(with_prompts(build("llama"))) != report[0]


# --- files ---


def test_a_prompt_belongs_to_the_adapter_it_was_tuned_with(tmp_path: Path) -> None:
    model = two_adapters()
    tuned = with_prompts(model)
    tuned.save_pretrained(tmp_path)
    for change, same in (("other", False), ("default", True)):
        tuned.set_adapter(change)
        other = spf.SoftPromptModel(model)
        if same:
            other.load_prompt(tmp_path / "long")
            continue
        for load in (other.load_prompt, lambda folder: PromptBank(model).add("p", folder)):
            with pytest.raises(ValueError, match=r"the prompt's base model must be .*force=True"):
                load(tmp_path / "long")
        other.load_prompt(tmp_path / "long", force=True)
    plain = build("llama")
    with pytest.raises(ValueError, match="with its adapters"):
        spf.SoftPromptModel.from_pretrained(plain, tmp_path)
    with tuned.disable_adapter():
        assert base_fingerprint(model) == base_fingerprint(plain)
    with_prompts(plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="force=True"):
        spf.SoftPromptModel.from_pretrained(model, tmp_path / "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_without_its_last_part_is_the_bases(kind: str) -> None:
    *same, _ = base_fingerprint(adapted(kind)).split(":")
    assert ":".join(same) == base_fingerprint(build("llama"))


@pytest.mark.parametrize("layout", ["beside", "around"])
def test_an_adapter_and_prompts_in_one_folder(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "softprompt_fast")
    tuned = with_prompts(adapted(), train_adapters=True)
    expected = check_generated(tuned)
    folder = tmp_path / "adapter" if layout == "beside" else tmp_path
    tuned.base_model.save_pretrained(folder)
    tuned.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(build("llama"), folder, is_trainable=True)
    loaded = spf.SoftPromptModel.from_pretrained(model.eval(), tmp_path, train_adapters=True)
    assert sorted(loaded.prompts) == sorted(PROMPTS)
    assert check_generated(loaded) == expected
    bank = PromptBank(model)
    assert sorted(bank.add_directory(tmp_path)) == sorted(PROMPTS)
    assert f"{folder} holds another adapter than a prompt and is left out" in caplog.messages
    assert any("lora_" in name for name in trained(loaded))


def test_copies_train_their_own_adapter() -> None:
    tuned = with_prompts(adapted(), train_adapters=True)
    other = copy.deepcopy(tuned)
    assert trained(other) == trained(tuned)
    text = check_generated(tuned)
    add_to_the_adapter(other.base_model)
    assert check_generated(other) != text == check_generated(tuned)


# --- what is refused ---


def test_rows_cannot_name_adapters() -> None:
    tuned = with_prompts(two_adapters())
    names = ["default", "other", "other", "default"]
    for call in (tuned, tuned.generate):
        with pytest.raises(ValueError, match=r"`adapter_names` cannot be.*: all rows of a batch run with the active"):
            call(IDS, prompt_ids=["short"] * 4, adapter_names=names)


def test_adapters_outside_of_the_layers_are_refused() -> None:
    config = peft.LoraConfig(**LORA, alora_invocation_tokens=[5, 6])
    with pytest.raises(TypeError, match=r"adapter 'default' \(activated LoRA\) begins at tokens"):
        spf.SoftPromptModel(peft.get_peft_model(build("llama"), config))
    poly = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_tasks=2)
    with pytest.raises(TypeError, match="its POLY adapter 'default' needs the task of each row"):
        spf.SoftPromptModel(peft.get_peft_model(build("llama"), poly))


# --- PEFT's prompts over LoRA ---


@pytest.mark.parametrize("kind", ["peft", "mixed", "transformers"])
def test_an_accelerated_prompt_over_adapters(kind: str) -> None:
    base = build("llama")
    if kind == "transformers":
        base.add_adapter(peft.LoraConfig(**LORA))
    else:
        config = peft.LoraConfig(**{k: v for k, v in LORA.items() if kind == "peft" or k != "task_type"})
        base = peft.get_peft_model(base, config, mixed=kind == "mixed")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = fill(peft.get_peft_model(base, prompt)).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        spf.accelerate(model)
        assert relative(model(input_ids=IDS).logits[:, 5:], expected[:, 5:]) < 1e-5
    assert model.execution_report().execution == "shared"


def test_a_mixed_model_has_no_prompt_to_accelerate() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(TypeError, match=r"`peft_model` must be one of PEFT's .*, got PeftMixedModel"):
        spf.accelerate(model)


# --- Trainer ---


def test_a_checkpoint_of_trainer_holds_both(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    tuned = with_prompts(adapted(), train_adapters=True)
    rows = [{"input_ids": ids, "labels": ids, "prompt_ids": row % 2} for row, ids in enumerate(IDS)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=3, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    before = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    Trainer(tuned, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in tuned.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trained(tuned))
    checkpoint = tmp_path / "checkpoint-3"
    loaded = spf.SoftPromptModel.from_pretrained(adapted(), checkpoint)
    assert check_generated(loaded) == check_generated(tuned.eval())
    with pytest.raises(ValueError, match=r"`model` must have the adapters that .* holds, but it has no 'base_model"):
        spf.SoftPromptModel.from_pretrained(build("llama"), checkpoint)


def test_a_reference_that_would_be_trained_is_refused() -> None:
    from softprompt_fast.interop import reference_model

    reference_model(with_prompts(adapted()))
    with pytest.raises(ValueError, match=r"`tuned` must not train adapters \(LoRA and others\) of its base"):
        reference_model(with_prompts(adapted(), train_adapters=True))


def test_an_adapter_is_frozen_again_when_nobody_trains_it_any_more() -> None:
    base = adapted()
    training = with_prompts(base, train_adapters=True)
    other = with_prompts(base)
    assert any(name.endswith("weight") and "lora" in name for name in trained(other))
    training.unload()
    del training
    assert not any("lora" in name for name in trained(other))
