"""``--adapter`` and ``--quantize``: a prompt is tuned, scored and used on a base with a LoRA, or with 8-bit weights."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import reviews, run
from typer.testing import CliRunner

from softprompt_fast.cli.app import app
from softprompt_fast.hf.loading import load_base_model
from softprompt_fast.tuning.run import tune

TASK = ["--template", "{text} Label:", "--label-word", "yes= yes", "--label-word", "no= no"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews(16)))
    return path


@pytest.fixture
def adapter(tmp_path: Path, model_folder: Path) -> Path:
    """A LoRA that changes the model's answers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def train(model: Path, data: Path, output: Path, *more: str) -> Any:
    common = ["--output", str(output), "--steps", "2", "--batch-size", "4", "-P", "3", "--dtype", "float32"]
    return run("train", "--model", str(model), "--data", str(data), *TASK, *common, *more)


def command_after(purpose: str, result: Any) -> list[str]:
    """The words of a command that `train` prints, without the program's name."""
    lines = result.output.splitlines()
    return shlex.split(lines[lines.index(f"{purpose}:") + 1])[1:]


def test_a_prompt_on_an_adapter(model_folder: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    result = train(model_folder, data, tmp_path / "run", "--adapter", str(adapter))
    prompt = str(tmp_path / "run" / "prompt")
    evaluate = command_after("score it on rows with labels", result)
    assert evaluate[evaluate.index("--adapter") + 1] == str(adapter)
    assert set(json.loads(run(*evaluate).stdout)) >= {"loss", "accuracy"}
    predict = command_after("label new rows", result)
    run(*predict)
    answers = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 16
    texts = [
        run("generate", "-p", prompt, "-d", str(data), "--max-new-tokens", "3", *more).output
        for more in (["--adapter", str(adapter)], ["--force"])
    ]
    assert texts[0] != texts[1]  # without the adapter the model says something else
    for command in ("evaluate", "predict"):
        refused = CliRunner().invoke(app, [command, "-p", prompt, "-d", str(data), "--dtype", "float32"])
        assert refused.exit_code != 0
        assert "the same without or with its adapters (--adapter)" in str(refused.exception)


def test_a_run_is_resumed_with_its_adapter_only(model_folder: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    train(model_folder, data, tmp_path / "run", "--adapter", str(adapter))
    with pytest.raises(ValueError, match=r"cannot resume: `model` was .* with adapters"):
        train(model_folder, data, tmp_path / "run", "--steps", "4", "--resume")
    train(model_folder, data, tmp_path / "run", "--steps", "4", "--resume", "--adapter", str(adapter))


def test_a_prompt_on_8_bits(model_folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    result = train(model_folder, data, tmp_path / "run", "--quantize", "int8")
    evaluate = command_after("score it on rows with labels", result)
    assert evaluate[evaluate.index("--quantize") + 1] == "int8"
    json.loads(run(*evaluate).stdout)
    run("evaluate", "-p", str(tmp_path / "run"), "-d", str(data), "--dtype", "float32")  # and on the base as it was


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_in_8_bits_with_an_adapter(model_folder: Path, adapter: Path, dtype: str) -> None:
    pytest.importorskip("torchao")
    model, _ = load_base_model(str(model_folder), dtype, "cpu", adapter=adapter, quantize="int8")
    plain, _ = load_base_model(str(model_folder), dtype, "cpu", adapter=str(adapter))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert "torchao" in type(layer.base_layer.weight).__module__
    assert type(layer.lora_A["default"].weight) is torch.nn.Parameter
    assert "torchao" not in type(model.get_output_embeddings().weight).__module__
    assert not model.training
    with torch.no_grad():
        ids = torch.arange(3, 12)[None]
        got, expected = (each(ids).logits.float() for each in (model, plain))
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()


def test_what_cannot_be_loaded(model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="`quantize` must be int8, got 'int2'"):
        load_base_model(str(model_folder), "float32", "cpu", quantize="int2")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(build("llama"), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="`adapter` must be LoRA or another adapter of layers, got a prompt in"):
        load_base_model(str(model_folder), "float32", "cpu", adapter=tmp_path / "prompt")
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora", safe_serialization=False)
    with pytest.raises(
        ValueError, match=r"`adapter` must be a folder with adapter_model\.safetensors, got .* a pickle"
    ):
        load_base_model(str(model_folder), "float32", "cpu", adapter=tmp_path / "lora")


def test_tuning_does_not_train_adapters(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from softprompt_fast.models.soft_prompt_model import SoftPromptModel
    from softprompt_fast.tasks.task import classification_task

    base = peft.PeftModel.from_pretrained(build("llama"), adapter, is_trainable=True)
    tuned = SoftPromptModel(base, train_adapters=True)
    _, tokenizer = load_base_model(str(model_folder), "float32", "cpu")
    task = classification_task(reviews(8), prompt="p")
    with pytest.raises(ValueError, match="`model` must have train_adapters=False because tuning trains"):
        tune(tuned, tokenizer, task, reviews(8), reviews(4), tmp_path / "run", steps=1)
