"""A prompt knows the model it was tuned on, and is not used with another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.tiny_models import BERT, build
from support.tiny_reviews import run, tiny_tokenizer
from typer.testing import CliRunner

from softprompt_fast.cli.app import app
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.models.deep_prompt_model import DeepPromptModel
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.prompts.base_identity import base_fingerprint, one_base, same_base
from softprompt_fast.prompts.peft_files import (
    CONFIG_FILE,
    FINGERPRINT,
    prompts_by_name,
    read_base,
    safe_name,
    write_prompt,
)
from softprompt_fast.tasks.task import TASK_FILE, Task


def llama(layers: int = 2, seed: int = 0) -> Any:
    base = build("llama")
    config = base.config
    config.num_hidden_layers = layers
    config.layer_types = None
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "layer_types"}))


def saved(folder: Path, model: Any, name: str = "p", kind: Any = SoftPromptModel) -> Path:
    tuned = kind(model)
    tuned.add_prompt(name, 3)
    tuned.save_pretrained(folder)
    return folder / name


def test_the_fingerprint_is_that_of_the_weights_in_any_type() -> None:
    model = llama()
    mine = base_fingerprint(model)
    assert {base_fingerprint(llama().to(dtype)) for dtype in (torch.bfloat16, torch.float16)} == {mine}
    headless = tf.LlamaModel(model.config)
    headless.load_state_dict(model.model.state_dict())
    assert base_fingerprint(headless) == mine
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    changed = base_fingerprint(model)
    assert not same_base(changed, mine) and changed.split(":")[:2] == mine.split(":")[:2]
    assert not same_base(base_fingerprint(llama(layers=3)), mine)
    assert not same_base(base_fingerprint(llama(seed=1)), mine)
    assert same_base(mine.rpartition(":")[0] + ":-", mine)  # quantised layers cannot be compared


def test_a_pooler_that_is_random_at_each_loading_does_not_matter(tmp_path: Path) -> None:
    tf.BertForMaskedLM(tf.BertConfig(**BERT)).save_pretrained(tmp_path / "masked")
    models = [tf.AutoModel.from_pretrained(tmp_path / "masked") for _ in range(2)]
    assert not torch.equal(models[0].pooler.dense.weight, models[1].pooler.dense.weight)
    folder = saved(tmp_path / "run", models[0])
    loaded = SoftPromptModel.from_pretrained(models[1], folder)
    assert loaded.prompts.names == ["p"]


def test_a_prompt_of_an_older_version_fits_the_base_with_its_pooler(tmp_path: Path) -> None:
    model, other = (tf.BertModel(tf.BertConfig(**BERT)) for _ in range(2))
    older = base_fingerprint(model, with_pooler=True)
    assert older != base_fingerprint(model)
    write_prompt(tmp_path / "p", torch.zeros(3, 32), {FINGERPRINT: older})
    SoftPromptModel(model).load_prompt(tmp_path / "p")
    with pytest.raises(ValueError, match="the prompt's base model must be"):
        SoftPromptModel(other).load_prompt(tmp_path / "p")


@pytest.mark.parametrize("kind", [SoftPromptModel, DeepPromptModel])
def test_a_prompt_of_another_base_is_refused_unless_forced(tmp_path: Path, kind: Any) -> None:
    folder = saved(tmp_path, llama(), kind=kind)
    assert len(kind.from_pretrained(llama(), tmp_path).prompts) == 1
    other = llama(seed=1)
    message = r"the prompt's base model must be .*, got .*; force=True \(--force\) uses it nevertheless"
    for load in (
        lambda force: kind(other).load_prompt(folder, force=force),
        lambda force: kind.from_pretrained(other, tmp_path, force=force),
        lambda force: PromptBank(other).add("p", folder, force=force),
        lambda force: PromptBank(other).add_directory(tmp_path, force=force),
    ):
        with pytest.raises(ValueError, match=message):
            load(False)
        load(True)


def test_folders_without_a_fingerprint_are_read(tmp_path: Path) -> None:
    write_prompt(tmp_path / "p", torch.zeros(2, 32), {"base_model_name_or_path": "somewhere"})
    assert read_base(tmp_path / "p") == ("somewhere", None)
    assert len(SoftPromptModel.from_pretrained(build("llama"), tmp_path).prompts) == 1


def test_peft_reads_a_folder_with_a_fingerprint(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path, llama())
    assert read_base(folder)[1] is not None
    model = peft.PeftModel.from_pretrained(llama(), folder)
    assert model.active_peft_config.num_virtual_tokens == 3
    assert not [w for w in recwarn if "nexpected keyword" in str(w.message)]


def test_prompts_of_two_bases_are_refused_by_both_names(tmp_path: Path) -> None:
    for name, fingerprint in (("a", "k:1:1"), ("b", "k:2:2")):
        facts = {"base_model_name_or_path": f"base-{name}", "base_fingerprint": fingerprint}
        write_prompt(tmp_path / name, torch.zeros(2, 32), facts)
    with pytest.raises(ValueError, match=r"must have one base model, got 'base-a' \(a\) and 'base-b' \(b\)"):
        one_base(prompts_by_name(tmp_path).values())
    one_base([tmp_path / "a"])


# --- names of folders ---


def test_any_folder_name_gives_a_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [safe_name(text) for text in ("v1.0", "llama-3.2-1b_sst2", "für alle", "...", "-x", "a" * 200)] == [
        "v1-0",
        "llama-3-2-1b_sst2",
        "f-r-alle",
        "prompt",
        "x",
        "a" * 128,
    ]
    for name in ("v1.0", "v1-0", "v1 0", "plain"):
        write_prompt(tmp_path / name, torch.zeros(2, 32), {})
    found = prompts_by_name(tmp_path)
    assert {folder.name for folder in found.values()} == {"v1.0", "v1-0", "v1 0", "plain"}
    assert found["v1-0"].name == "v1-0" and found["plain"].name == "plain"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "'v1.0' is 'v1-0-" in lines[0]
    bank = PromptBank(build("llama"))
    assert bank.add_directory(tmp_path) == list(found)
    assert SoftPromptModel(build("llama")).load_prompt(tmp_path / "v1.0").shape == (2, 32)
    assert list(SoftPromptModel.from_pretrained(build("llama"), tmp_path, ["v1.0"]).prompts) == [
        name for name, folder in found.items() if folder.name == "v1.0"
    ]


# --- commands ---


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, another of its width, and prompts of both."""
    folder = tmp_path_factory.mktemp("stored")
    tokenizer = tiny_tokenizer()
    task = Task("classification", "{text} Label :", "label", {"yes": " yes", "no": " no"})
    for name, model in (("base", llama()), ("other", llama(seed=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder / name)
        prompt = saved(folder / "prompts", loaded, f"of-{name}")
        Task(**vars(task) | {"model": str(folder / name), "prompt": f"of-{name}"}).save(prompt)
    rows = [{"text": text, "label": "yes", "prompt": "of-base"} for text in ("fine film", "dull")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def failing(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code != 0
    return " ".join(str(result.exception or "").split()) or " ".join(result.output.split())


@pytest.mark.parametrize("command", ["predict", "evaluate", "generate", "interpret"])
def test_commands_refuse_another_base_unless_forced(stored: Path, command: str) -> None:
    prompt, rows = str(stored / "prompts" / "of-base"), str(stored / "rows.jsonl")
    arguments = [command, "-p", prompt, "-d", rows, "--dtype", "float32"]
    assert "the prompt's base model must be" in failing(*arguments, "-m", str(stored / "other"))
    run(*arguments, "-m", str(stored / "other"), "--force")


def test_a_folder_of_two_bases_is_refused_before_a_model_is_loaded(stored: Path) -> None:
    prompts, rows = str(stored / "prompts"), str(stored / "rows.jsonl")
    message = failing("predict", "-p", prompts, "-d", rows, "--prompt-name-column", "prompt")
    assert str(stored / "base") in message and str(stored / "other") in message


def test_a_prompt_without_a_task_takes_one_from_options(stored: Path, tmp_path: Path) -> None:
    prompt, rows = tmp_path / "v1.0", str(stored / "rows.jsonl")
    shutil.copytree(stored / "prompts" / "of-base", prompt)
    own = run("predict", "-p", str(prompt), "-d", rows, "--dtype", "float32").stdout
    with_task = ["-p", str(stored / "prompts" / "of-base"), "-d", rows, "--template", "{text}"]
    assert "--template cannot be combined with prompts that have a task.json" in failing("predict", *with_task)
    (prompt / TASK_FILE).unlink()
    for command in ("predict", "evaluate"):
        assert "--template and --label-word must be given" in failing(command, "-p", str(prompt), "-d", rows)
    options = ["--template", "{text} Label :", "--label-word", "yes=yes", "--label-word", "no= no"]
    given = ["-p", str(prompt), "-d", rows, "--dtype", "float32", *options]
    assert run("predict", *given).stdout == own
    assert json.loads(run("evaluate", *given).stdout)["rows"] == 2
    assert json.loads((prompt / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(stored / "base")
