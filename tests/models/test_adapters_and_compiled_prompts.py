"""Compiled prompts depend on the adapters in the base: after a change none of another state is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import adapted, add_to_the_adapter, check_generated, trained, two_adapters, with_prompts
from support.rows_alone import PROMPTS
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank

pytest.importorskip("peft")


def scale_the_adapter(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "switched": lambda model: model.set_adapter("other"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "trained": add_to_the_adapter,
    "scaled": scale_the_adapter,
    "deleted": lambda model: model.delete_adapter("default"),
}


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("change", CHANGES)
def test_generate_after_a_change_of_the_adapters(change: str) -> None:
    tuned = with_prompts(two_adapters())
    first = check_generated(tuned)
    CHANGES[change](tuned.base_model)
    assert check_generated(tuned) != first


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("change", CHANGES)
def test_a_bank_after_a_change_of_the_adapters(change: str, storage: str) -> None:
    tuned = with_prompts(two_adapters())
    bank = PromptBank(tuned, storage=storage)
    before = compiled_values(bank)
    assert bank.stats()["misses"] == len(PROMPTS)
    assert torch.equal(compiled_values(bank), before) and bank.stats()["misses"] == len(PROMPTS)
    CHANGES[change](tuned.base_model)
    after = compiled_values(bank)
    assert torch.equal(after, compiled_values(PromptBank(tuned, storage=storage)))
    assert not torch.allclose(after, before)
    assert bank.stats()["compiled_bytes"] == sum(PROMPTS.values()) * bank.bytes_per_token


def compiled_values(bank: PromptBank) -> Tensor:
    with bank.use(list(PROMPTS)) as view:
        assert view.compiled is not None
        slots = [slot for first, count in view.prefixes for slot in range(first, first + count)]
        return view.compiled[:, :, slots].clone()


def test_a_running_batch_keeps_what_it_began_with() -> None:
    tuned = with_prompts(two_adapters())
    bank = PromptBank(tuned)
    with bank.use(["long"]) as first:
        assert first.compiled is not None
        old = first.compiled[:, :, : first.prefixes[0][1]].clone()
        tuned.set_adapter("other")
        with bank.use(["long"]) as second:
            assert second.compiled is not None and second.prefixes != first.prefixes
        assert torch.equal(first.compiled[:, :, : first.prefixes[0][1]], old)
    assert bank.stats()["compiled_bytes"] == PROMPTS["long"] * bank.bytes_per_token


def test_compiled_files_belong_to_the_active_adapter(tmp_path: Path) -> None:
    tuned = with_prompts(two_adapters())
    bank = PromptBank(tuned)
    bank.save_compiled(tmp_path)
    assert sorted(bank.load_compiled(tmp_path)) == sorted(PROMPTS)
    tuned.set_adapter("other")
    with pytest.raises(ValueError, match="was compiled with other weights"):
        bank.load_compiled(tmp_path)
    tuned.set_adapter("default")
    assert sorted(bank.load_compiled(tmp_path)) == sorted(PROMPTS)


def test_merging_keeps_the_text() -> None:
    model = adapted()
    tuned = with_prompts(model)
    text = check_generated(tuned)
    model.merge_adapter()
    assert check_generated(tuned) == text
    model.unmerge_adapter()
    assert check_generated(tuned) == text
    prompts = tuned.prompts
    merged = spf.SoftPromptModel(model.merge_and_unload(), prompts)
    assert check_generated(merged) == text
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_training_both_with_a_bank_over_them() -> None:
    tuned = with_prompts(adapted(), train_adapters=True)
    bank = PromptBank(tuned)
    assert any("lora_" in name for name in trained(tuned))  # the bank freezes nothing that is trained
    del bank
