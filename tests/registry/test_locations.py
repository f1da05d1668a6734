"""Everything that takes the folder of a prompt takes the name of a version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.registry_worker import TASK
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.base.locations import located
from softprompt_fast.inference import PromptBank, SoftPromptPipeline
from softprompt_fast.prompts import read_prompt
from softprompt_fast.registry import PromptRegistry
from softprompt_fast.tasks import Task


@pytest.fixture
def tuned(registry: PromptRegistry, tmp_path: Path) -> spf.SoftPromptModel:
    """A model whose prompt is version 1 of ``sentiment``; its deep prompt is version 1 of ``deep``."""
    model = build("llama")
    tuned, deep = spf.SoftPromptModel(model), spf.DeepPromptModel(model)
    tuned.add_prompt("p", 3)
    deep.add_prompt("d", 2, init="random")
    for kind in (tuned, deep):
        kind.save_pretrained(tmp_path / "saved")
    for name, registered in (("p", "sentiment"), ("d", "deep")):
        TASK.save(tmp_path / "saved" / name)
        registry.add(tmp_path / "saved" / name, registered, alias="production")
    return tuned


Use = Callable[[spf.SoftPromptModel, str], torch.Tensor]


def with_bank(tuned: spf.SoftPromptModel, name: str) -> torch.Tensor:
    bank = PromptBank(tuned.base_model)
    bank.add("p", name)
    assert bank.task("p") == Task.load(name)
    assert bank.add_directory(name) == ["sentiment"]
    pipe = SoftPromptPipeline(bank, tiny_tokenizer())
    by_one, by_other = (pipe.classify([{"text": "fine film"}], [prompt])[0] for prompt in bank.names)
    assert by_one == by_other and "prediction" in by_one
    return bank["sentiment"]


def with_initial_values(tuned: spf.SoftPromptModel, name: str) -> torch.Tensor:
    return tuned.add_prompt("new", init=name)


USES: dict[str, Use] = {
    "load_prompt": lambda tuned, name: tuned.load_prompt(name, "other"),
    "from_pretrained": lambda tuned, name: spf.SoftPromptModel.from_pretrained(tuned.base_model, name).prompts[
        "sentiment"
    ],
    "read_prompt": lambda tuned, name: read_prompt(name)[0],
    "bank": with_bank,
    "init": with_initial_values,
}


@pytest.mark.parametrize("use", USES)
def test_python_takes_versions(tuned: spf.SoftPromptModel, use: str) -> None:
    expected = tuned.prompts["p"].detach().clone()
    for name in ("sentiment@1", "sentiment@production", "sentiment@latest"):
        fresh = spf.SoftPromptModel(tuned.base_model)
        assert torch.equal(USES[use](fresh, name).detach(), expected)
        with pytest.raises(LookupError, match="no version '2'"):
            USES[use](spf.SoftPromptModel(tuned.base_model), "sentiment@2")


def test_deep_prompts_have_versions_too(tuned: spf.SoftPromptModel, registry: PromptRegistry) -> None:
    deep = spf.DeepPromptModel(tuned.base_model)
    values = deep.load_prompt("deep@production", "d").detach()
    assert torch.equal(deep.read_prompt("deep@1"), values)
    assert torch.equal(deep.add_prompt("copy", init="deep@1").detach(), values)
    bank = PromptBank(tuned.base_model)
    bank.add("d", "deep@production")
    assert torch.equal(bank["d"], values)
    difference = registry.diff("deep@1", "deep@production")
    assert difference.same_files and difference.distance is not None
    assert difference.distance.relative_change == 0.0
    assert registry.diff("deep@1", "sentiment@1").distance is None


def test_a_version_of_another_base_is_refused(tuned: spf.SoftPromptModel) -> None:
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    for load in (
        lambda: spf.SoftPromptModel(other).load_prompt("sentiment@1"),
        lambda: PromptBank(other).add("p", "sentiment@1"),
    ):
        with pytest.raises(ValueError, match="the prompt's base model must be"):
            load()


def test_a_folder_with_the_name_of_a_version_comes_first(
    tuned: spf.SoftPromptModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = spf.SoftPromptModel(tuned.base_model)
    other.add_prompt("p", 5)
    other.save_pretrained(tmp_path)
    Path("p").rename("sentiment@1")
    assert located("sentiment@1") == Path("sentiment@1")
    assert len(read_prompt("sentiment@1")[0]) == 5 and len(read_prompt("sentiment@production")[0]) == 3


@pytest.mark.parametrize("text", ["sentiment", "./sentiment@1", "@1", "sentiment@", "a b@1"])
def test_other_texts_are_paths(text: str) -> None:
    assert located(text) == Path(text)


def test_a_version_without_mlflow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r'needs MLflow: pip install "softprompt_fast\[production\]"'):
        located("sentiment@1")
    assert located("folder") == Path("folder")
