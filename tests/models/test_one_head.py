"""A model has one head: no prompt runs with a head of other prompts unless that is forced."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import build

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
NO_HEAD = "the prompt must have a head, because the model's came with or was trained for the prompts"


def base(name: str = "llama") -> Any:
    return build(name, head="SequenceClassification")


def change_head(model: Any) -> None:
    """As a step of an optimiser does."""
    with torch.no_grad():
        model.score.weight.add_(1.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts without a head, with a head, and with another head."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, steps in (("plain", 0), ("first", 1), ("second", 2)):
        tuned = spf.SoftPromptModel(base(), train_head=name != "plain")
        tuned.add_prompt(name, 3, seed=steps)
        for _ in range(steps):
            change_head(tuned.base_model)
        tuned.save_pretrained(folder)
    return folder


def logits(tuned: spf.SoftPromptModel, name: str) -> torch.Tensor:
    return tuned(IDS, prompt_ids=name).logits.detach()


def test_a_prompt_without_a_head_does_not_run_with_the_head_of_another(stored: Path) -> None:
    tuned = spf.SoftPromptModel(base(), train_head=False)
    tuned.load_prompt(stored / "first")
    with pytest.raises(ValueError, match=rf"plain: {NO_HEAD} first; .* force=True"):
        tuned.load_prompt(stored / "plain")
    assert tuned.prompts.names == ["first"]
    tuned.load_prompt(stored / "plain", force=True)
    with pytest.raises(ValueError, match=NO_HEAD):
        spf.SoftPromptModel.from_pretrained(base(), stored, ["first", "plain"])


def test_prompts_without_a_head_share_the_bases_own(stored: Path) -> None:
    tuned = spf.SoftPromptModel(base(), train_head=False)
    tuned.add_prompt("other", 2)
    tuned.load_prompt(stored / "plain")
    tuned.load_prompt(stored / "plain", "again")
    assert tuned.prompts.names == ["other", "plain", "again"]


def test_a_head_that_is_trained_takes_more_prompts_until_it_changes(stored: Path) -> None:
    tuned = spf.SoftPromptModel(base(), train_head=True)
    tuned.add_prompt("other", 2)
    tuned.load_prompt(stored / "plain")
    tuned.add_prompt("new", 2)
    tuned.train()(IDS, labels=torch.tensor([0, 1, 1, 0]), prompt_ids="new").loss.backward()
    torch.optim.SGD([tuned.base_model.score.weight], 0.1).step()
    tuned.add_prompt("newer", 2)
    with pytest.raises(ValueError, match=NO_HEAD):
        tuned.load_prompt(stored / "plain", "again")
    tuned.load_prompt(stored / "plain", "again", force=True)


def test_a_bank_refuses_a_prompt_without_a_head_beside_a_head(stored: Path) -> None:
    bank = PromptBank(base())
    bank.add("first", stored / "first")
    with pytest.raises(ValueError, match=rf"plain: {NO_HEAD} first"):
        bank.add("plain", stored / "plain")
    assert bank.names == ["first"]
    bank.add("plain", stored / "plain", force=True)
    plain = PromptBank(base())
    plain.add("a", stored / "plain")
    plain.add("b", stored / "plain")


def test_an_object_does_not_replace_the_head_that_another_one_uses(stored: Path) -> None:
    model = base()
    tuned = spf.SoftPromptModel.from_pretrained(model, stored / "first")
    expected = logits(tuned, "first")
    make = spf.SoftPromptModel.from_pretrained
    with pytest.raises(ValueError, match=r"`score.weight` differs .* the prompts first use; a model has one head"):
        make(model, stored / "second")
    with pytest.raises(ValueError, match=rf"plain: {NO_HEAD} first"):
        bank = PromptBank(model)
        bank.add("plain", stored / "plain")
    assert torch.equal(logits(tuned, "first"), expected)
    assert torch.equal(logits(make(model, stored / "first"), "first"), expected)
    make(model, stored / "second", force=True)


def test_a_checkpoint_does_not_replace_the_head_that_another_object_uses(stored: Path, tmp_path: Path) -> None:
    other = spf.SoftPromptModel.from_pretrained(base(), stored / "second")
    save_file({key: value.clone() for key, value in other.state_dict().items()}, tmp_path / "model.safetensors")
    model = base()
    tuned = spf.SoftPromptModel.from_pretrained(model, stored / "first")
    expected = logits(tuned, "first")
    with pytest.raises(ValueError, match="a model has one head"):
        spf.SoftPromptModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(tuned, "first"), expected)
    spf.SoftPromptModel.from_pretrained(model, tmp_path, force=True)


@pytest.mark.parametrize("end", ["unload", "del", "cycle"])
def test_a_head_that_nobody_uses_any_more_is_replaced(stored: Path, end: str) -> None:
    model = base()
    tuned = spf.SoftPromptModel.from_pretrained(model, stored / "first")
    if end == "unload":
        tuned.unload()
    elif end == "cycle":
        tuned.itself = [tuned]  # an object that only the garbage collector frees
    if end != "unload":
        del tuned
    assert spf.SoftPromptModel.from_pretrained(model, stored / "second").prompts.names == ["second"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tuned: pickle.loads(pickle.dumps(tuned))])
def test_a_copy_knows_that_its_head_came_with_a_prompt(stored: Path, copied: Any) -> None:
    other = copied(spf.SoftPromptModel.from_pretrained(base(), stored / "first"))
    with pytest.raises(ValueError, match=NO_HEAD):
        other.load_prompt(stored / "plain")
    with pytest.raises(ValueError, match="a model has one head"):
        spf.SoftPromptModel.from_pretrained(other.base_model, stored / "second")
