"""TRL's trainers with a SoftPromptModel, a DeepPromptModel or an accelerated PEFT model: two steps, and their numbers.

The oracle is each row run alone, without padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_models import VIRTUAL, base_model, peft_model
from support.rows_alone import relative
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.trl_trainers import PREFERENCES, TEXTS, dpo, grpo, log_probs, logits_before, make, settings, sft, trained
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.interop import reference_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parent.parent.parent

KINDS = ["soft", "padded", "deep", "peft"]


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CI", "1")  # TRL then sends nothing
    yield


# --- SFT ---


@pytest.mark.parametrize("kind", ["soft", "padded", "deep"])
def test_the_loss_of_sft_is_the_mean_over_the_tokens_of_rows_alone(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    rows = [tiny_tokenizer()(text + "</s>")["input_ids"] for text in TEXTS]
    every = torch.cat([logits_before(model, ids, prompt=True) for ids in rows])
    tokens = torch.tensor([token for ids in rows for token in ids])
    predicted = ~every.isnan().any(1)
    assert predicted.sum() == len(tokens) - (len(rows) if kind == "deep" else 0)
    distribution = every[predicted].log_softmax(1)
    before = trained(model)
    trainer = sft(model, tmp_path)
    trainer.train()
    first = trainer.state.log_history[0]
    found = distribution[torch.arange(len(distribution)), tokens[predicted]]
    assert first["loss"] == pytest.approx(-found.mean().item(), rel=1e-4)
    assert first["entropy"] == pytest.approx(-(distribution.exp() * distribution).sum(1).mean().item(), rel=1e-4)
    right = (distribution.argmax(1) == tokens[predicted]).float().mean().item()
    assert first["mean_token_accuracy"] == pytest.approx(right, rel=1e-4)
    assert relative(trained(model), before) > 1e-3


def test_sft_of_completions_learns_them_only(tmp_path: Path) -> None:
    model = make("soft")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
    expected = []
    for row in rows:
        prompt, completion = (tiny_tokenizer()(text)["input_ids"] for text in (row["prompt"], row["completion"]))
        expected.append(log_probs(model, [*prompt, *completion, 2], prompt=True)[len(prompt) :])
    trainer = sft(model, tmp_path, rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-torch.cat(expected).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_sft_of_an_accelerated_model_is_that_of_pefts(kind: str, tmp_path: Path) -> None:
    """With padding on the right, where PEFT is right too."""
    ends, losses = [], []
    for fast in (False, True):
        model = peft_model(kind=kind)
        trainer = sft(spf.accelerate(model) if fast else model, tmp_path, gradient_checkpointing=False)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history[:2]])
        ends.append(trained(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert relative(ends[1], ends[0]) < 1e-3


def test_gradient_accumulation_weighs_every_token_alike(tmp_path: Path) -> None:
    model, ends = make("soft"), []
    for rows, steps in ((4, 1), (1, 4)):
        copied = copy.deepcopy(model)
        sft(copied, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps).train()
        ends.append(trained(copied))
    assert relative(ends[1], ends[0]) < 1e-3


def test_label_smoothing_and_metrics_read_logits(tmp_path: Path) -> None:
    model = make("soft")
    options = {"label_smoothing_factor": 1e-9, "eval_strategy": "no"}
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
    losses = []
    for more in ({}, options):
        trainer = sft(copy.deepcopy(model), tmp_path, rows, **more)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["soft", "peft"])
def test_autocast_to_bfloat16_which_is_trls_default(kind: str, tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = make(kind)
        before = trained(model)
        trainer = sft(model, tmp_path, bf16=bf16)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert relative(trained(model), before) > 1e-3
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=3e-2)


@pytest.mark.parametrize("kind", ["soft", "deep", "peft"])
@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_several_texts_in_one_row_are_refused(kind: str, option: str, tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 16} if option == "packing" else {"padding_free": True, "max_length": None}
    with pytest.raises(ValueError, match=r"`position_ids`.*`packing`"):
        sft(make(kind), tmp_path, **options).train()


@pytest.mark.parametrize("kind", ["soft", "deep", "peft"])
def test_what_sft_saves_loads_again_and_resumes(kind: str, tmp_path: Path) -> None:
    ends = []
    for part in ("whole", "resumed"):
        torch.manual_seed(0)
        model = make(kind)
        trainer = sft(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if part == "resumed" else None)
        ends.append(trained(model))
    assert torch.equal(ends[0], ends[1])
    trainer.save_model(str(tmp_path / "final"))
    tuned_class = spf.DeepPromptModel if kind == "deep" else spf.SoftPromptModel
    for folder in ("final", "run/checkpoint-4"):
        if kind == "peft":
            theirs = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / folder)
            assert torch.equal(theirs.get_prompt(1)[0].flatten(), ends[0])
        again = tuned_class.from_pretrained(base_model("llama"), tmp_path / folder)
        assert torch.equal(trained(again), ends[0])


# --- DPO ---


def completions_alone(model: Any, name: str, *, prompt: bool) -> Tensor:
    """[B], log-probabilities of the completions `name`, each row alone."""
    sums = []
    for row in PREFERENCES:
        start, end = (tiny_tokenizer()(row[key])["input_ids"] for key in ("prompt", name))
        sums.append(log_probs(model, [*start, *end, 2], prompt=prompt)[len(start) :].sum())
    return torch.stack(sums)


def expected_of_dpo(model: Any, *, reference_has_prompt: bool = False) -> dict[str, float]:
    facts = {}
    for name in ("chosen", "rejected"):
        policy = completions_alone(model, name, prompt=True)
        facts[f"logps/{name}"] = policy.mean().item()
        against = completions_alone(model, name, prompt=reference_has_prompt)
        facts[f"rewards/{name}"] = 0.3 * (policy - against).mean().item()
    return facts


@pytest.fixture
def without_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a second copy is loaded")

    for name in ("dpo_trainer", "grpo_trainer", "kto_trainer"):
        monkeypatch.setattr(f"trl.trainer.{name}.create_model_from_path", load)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("without_second_copy")
def test_dpo_compares_with_the_base_without_a_prompt(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    expected = expected_of_dpo(model)
    before = trained(model)
    trainer = dpo(model, tmp_path, ref_model=reference_model(model) if kind == "peft" else None)
    trainer.train()
    first = trainer.state.log_history[0]
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name
    assert relative(trained(model), before) > 1e-3
    assert not list(trainer.ref_model.parameters())


@pytest.mark.parametrize("kind", ["soft", "peft", "prefix"])
@pytest.mark.usefixtures("without_second_copy")
def test_dpo_compares_with_the_prompt_as_it_was(kind: str, tmp_path: Path) -> None:
    """TRL does so with an adapter of PEFT that it is given; here the reference says so."""
    model = make(kind)
    if kind == "prefix":
        trainer = dpo(model, tmp_path)
        trainer.train()
        first, second = trainer.state.log_history[:2]
    else:
        expected = expected_of_dpo(model, reference_has_prompt=True)
        trainer = dpo(model, tmp_path, ref_model=reference_model(model, "p") if kind == "soft" else None)
        trainer.train()
        first, second = trainer.state.log_history[:2]
        assert first["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert abs(second["rewards/margins"]) > 1e-4  # the reference does not follow the prompt


@pytest.mark.usefixtures("without_second_copy")
def test_trl_makes_a_peft_model_that_is_accelerated_afterwards(tmp_path: Path) -> None:
    """Its reference is the base with the adapter disabled."""
    trainer = trl.DPOTrainer(
        base_model("llama"),
        args=settings(trl.DPOConfig, tmp_path, beta=0.3),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
        peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    )
    model = spf.accelerate(trainer.model)
    expected = expected_of_dpo(model)
    trainer.train()
    for name, value in expected.items():
        assert trainer.state.log_history[0][name] == pytest.approx(value, rel=1e-4), name
    assert model.execution_report().checked


def test_trls_own_dpo_says_that_it_loads_a_second_copy(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its numbers are the same."""
    from softprompt_fast.hf import load_base_model

    model = spf.SoftPromptModel(load_base_model(str(model_folder), "float32", "cpu")[0])
    model.add_prompt("p", init=torch.randn(VIRTUAL, 32) * 0.5)
    expected = expected_of_dpo(model)
    with caplog.at_level("WARNING", logger="softprompt_fast"):
        trainer = dpo(model, tmp_path, trl.DPOTrainer)
    assert any("second copy" in message for message in caplog.messages)
    trainer.train()
    for name, value in expected.items():
        assert trainer.state.log_history[0][name] == pytest.approx(value, rel=1e-4), name
    caplog.clear()
    with caplog.at_level("WARNING", logger="softprompt_fast"):
        dpo(model, tmp_path, trl.DPOTrainer, reference_model(model))
    assert not caplog.messages


def test_references_computed_before_are_stored_for_this_base(tmp_path: Path) -> None:
    """TRL stores them under a hash of the reference's weights, which are the base's."""
    hashes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = spf.SoftPromptModel(build("llama"))
        with torch.no_grad():
            model.base_model.lm_head.weight.add_(seed)
        model.add_prompt("p", init=torch.ones(VIRTUAL, 32))
        expected = expected_of_dpo(model)
        trainer = dpo(model, tmp_path, precompute_ref_log_probs=True)
        hashes.append(trainer._precompute_model_hash)
        trainer.train()
        assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(expected["rewards/chosen"], rel=1e-4)
    assert hashes[0] != hashes[1]


@pytest.mark.usefixtures("without_second_copy")
def test_another_trainer_shares_the_base(tmp_path: Path) -> None:
    model = make("soft")
    expected = expected_of_dpo(model)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PREFERENCES]
    rows += [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in PREFERENCES]
    trainer = trl.KTOTrainer(
        model,
        reference_model(model),
        settings(trl.KTOConfig, tmp_path, beta=0.3, per_device_train_batch_size=8),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    for name, value in expected.items():
        assert trainer.state.log_history[0][name] == pytest.approx(value, rel=1e-4), name


def test_what_dpo_saves_loads_again(tmp_path: Path) -> None:
    model = make("soft")
    trainer = dpo(model, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "run/checkpoint-2"):
        again = spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path / folder)
        assert torch.equal(trained(again), trained(model))


# --- GRPO ---


PROMPTS = [[4, 5, 6], [7], [8, 9, 4, 5, 6], [10, 11]]
COMPLETIONS = [[12, 13], [14, 4, 5, 6], [7], [8, 9, 10]]


def generated() -> tuple[Tensor, Tensor]:
    """ids and mask [4, 9] as GRPO makes them: prompts end, and completions begin, at the same column."""
    ids, mask = torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        columns = slice(5 - len(prompt), 5 + len(completion))
        ids[row, columns], mask[row, columns] = torch.tensor([*prompt, *completion]), 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("without_second_copy")
def test_grpo_compares_with_the_base_without_a_prompt(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    before, weights = trained(model), copy.deepcopy(model.base_model.state_dict())
    trainer = grpo(model, tmp_path)
    ids, mask = generated()
    compared = [(trainer.model, True)] + ([(trainer.ref_model, False)] if kind != "peft" else [])
    for network, prompt in compared:
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            network, ids, mask, 4, compute_entropy=network is model
        )
        for row, (start, end) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            expected = log_probs(model, [*start, *end], prompt=prompt, temperature=0.7)[len(start) :]
            torch.testing.assert_close(found[row, : len(end)], expected, rtol=1e-4, atol=1e-5)
            assert not found[row, len(end) :].any()
            if entropies is not None:
                logits = logits_before(model, [*start, *end], prompt=True)[len(start) :] / 0.7
                expected = torch.distributions.Categorical(logits=logits).entropy()
                torch.testing.assert_close(entropies[row, : len(end)], expected, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert trainer.args.beta == trainer.beta == 0.1
    kl = [entry["kl"] for entry in trainer.state.log_history[:2]]
    assert kl[1] > 1e-4 and (kl[0] > 1e-4) == (kind != "peft")  # TRL compares an adapter with its own copy
    assert relative(trained(model), before) > 1e-3
    assert all(torch.equal(value, weights[name]) for name, value in model.base_model.state_dict().items())


@pytest.mark.usefixtures("without_second_copy")
def test_grpo_with_another_reference_or_none(tmp_path: Path) -> None:
    model = make("soft")
    trainer = grpo(model, tmp_path, ref_model=reference_model(model, "p"), save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    again = spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path / "checkpoint-2")
    assert torch.equal(trained(again), trained(model))
    trainer = grpo(model, tmp_path, beta=0.0)
    trainer.train()
    assert trainer.ref_model is None and "kl" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="`ref_model` cannot be given"):
        grpo(model, tmp_path, beta=0.0, ref_model=reference_model(model))


# --- documents and errors ---


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source tree")
def test_the_scripts_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *scripts = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "trainers.md").read_text(), re.M | re.S)
    assert "load_base_model" in first and len(scripts) == 5
    monkeypatch.chdir(tmp_path)
    base = build("llama")
    names: dict[str, Any] = {
        "spf": spf,
        "base": base,
        "tuned": spf.SoftPromptModel(base),
        "tokenizer": tiny_tokenizer(),
    }
    names["tuned"].add_prompt("mine", 4)
    names["rows"] = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    names["preferences"] = datasets.Dataset.from_list(PREFERENCES)
    names["questions"] = datasets.Dataset.from_list([{"prompt": text} for text in TEXTS * 2])
    for script in scripts:
        short = script.replace('Config("run"', 'Config("run", use_cpu=True, num_train_epochs=1')
        exec(short.replace("beta=0.04", "beta=0.04, max_completion_length=4"), names)
        assert names["trainer"].args.max_steps == -1
    saved = spf.SoftPromptModel.from_pretrained(base, "run/final")
    assert saved.prompts.names == ["mine"] and isinstance(names["trainer"].model, peft.PeftModel)


def test_errors(tmp_path: Path) -> None:
    model = make("soft")
    for make_trainer in (dpo, grpo):
        with pytest.raises(ValueError, match="`sync_ref_model` must be False"):
            make_trainer(model, tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="`use_vllm` must be False"):
        grpo(model, tmp_path, use_vllm=True)
    with pytest.raises(TypeError, match="`tuned` must be a SoftPromptModel"):
        reference_model(build("llama"))
    with pytest.raises(KeyError, match="none"):
        reference_model(model, "none")
    with pytest.raises(ValueError, match="`prompt` cannot be given with a PEFT model"):
        reference_model(make("peft"), "default")
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match="`add_fused_lm_head` was not called"):
        model(ids, labels=ids, fused_lm_head=True)
    trl.trainer.utils.add_fused_lm_head(model)
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="`labels` must be given with `fused_lm_head`, got NoneType"):
        model(ids, fused_lm_head=True)
    with pytest.raises(ValueError, match="`shift_labels` cannot be given"):
        model(ids, shift_labels=ids, fused_lm_head=True)
    found = model(ids, labels=ids, fused_lm_head=True)
    assert found.loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert found.entropy is None and found.label_mask.tolist() == [[True] * 3]
    nothing = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    nothing.loss.backward()
    assert nothing.loss.item() == 0 and not nothing.label_mask.any()
