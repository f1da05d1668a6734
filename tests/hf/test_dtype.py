"""dtype "auto" on a CPU: the faster of two dtypes by measurement, remembered; memory that fits only one decides."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.tiny_models import build
from support.tiny_reviews import run, tiny_tokenizer
from transformers import LlamaConfig, T5Config

from softprompt_fast.base import machine
from softprompt_fast.hf import dtype as module
from softprompt_fast.hf.dtype import LayerSpeed, choose_dtype, layer_sizes, layer_speed, measure, remembered
from softprompt_fast.hf.loading import load_base_model, resolve_dtype

FAST_FLOAT32, FAST_BFLOAT16 = LayerSpeed(281.0, 164.0), LayerSpeed(140.0, 340.0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(module, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def pretend(monkeypatch: pytest.MonkeyPatch, speed: LayerSpeed) -> list[tuple[int, int]]:
    """Replaces the measurement; returns the sizes that are measured."""
    measured: list[tuple[int, int]] = []

    def fake(hidden: int, intermediate: int) -> LayerSpeed:
        measured.append((hidden, intermediate))
        return speed

    monkeypatch.setattr(module, "measure", fake)
    return measured


@pytest.mark.parametrize(
    ("speed", "expected", "line"),
    [
        (FAST_FLOAT32, torch.float32, "float32: 281 against 164 GFLOP/s per core in bfloat16"),
        (FAST_BFLOAT16, torch.bfloat16, "bfloat16: 340 against 140 GFLOP/s per core in float32"),
    ],
)
@pytest.mark.parametrize("flags", ["avx2", "avx2 avx512_bf16 amx_bf16"])
def test_auto_is_the_faster_dtype_whatever_the_flags_say(
    speed: LayerSpeed,
    expected: torch.dtype,
    line: str,
    flags: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    measured = pretend(monkeypatch, speed)
    out = io.StringIO()
    model, _ = load_base_model(str(model_folder), device="cpu", console=Console(file=out, width=200))
    assert model.dtype == expected
    assert out.getvalue() == f"the model runs in {line}, measured on this machine\n"
    assert measured == [(model.config.hidden_size, model.config.intermediate_size)]
    choice = resolve_dtype(str(model_folder), device="cpu")
    assert choice is not None and (choice.dtype, choice.reason) == (expected, f"{line}, measured on this machine")
    assert len(measured) == 1  # the second answer comes from the cache


def test_a_dtype_that_is_asked_for_is_not_measured(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch, FAST_FLOAT32)
    out = io.StringIO()
    model, _ = load_base_model(str(model_folder), "bfloat16", "cpu", console=Console(file=out))
    assert model.dtype == torch.bfloat16 and measured == [] and out.getvalue() == ""
    assert resolve_dtype(str(model_folder), "bfloat16", "cpu") is None
    assert resolve_dtype(str(model_folder), "auto", "cuda") is None
    for call in (load_base_model, resolve_dtype):
        with pytest.raises(ValueError, match="`dtype` must be auto, float32, bfloat16, float16, got 'int8'"):
            call(str(model_folder), "int8", "cpu")


def test_encoder_decoder_models_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    measured = pretend(monkeypatch, FAST_BFLOAT16)
    model, _ = load_base_model(str(tmp_path), device="cpu")
    assert model.dtype == torch.bfloat16 and measured == [(model.config.d_model, model.config.d_ff)]


def test_sizes_come_from_the_configuration() -> None:
    assert layer_sizes(LlamaConfig(hidden_size=64, intermediate_size=160)) == (64, 160)
    assert layer_sizes(T5Config(d_model=64, d_ff=96)) == (64, 96)
    text = SimpleNamespace(hidden_size=32, n_inner=None)
    assert layer_sizes(SimpleNamespace(get_text_config=lambda: text)) == (32, 128)


def test_memory_that_fits_only_one_dtype_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=160)
    measured = pretend(monkeypatch, FAST_FLOAT32)
    monkeypatch.setattr(module, "available_memory", lambda: 16 * 10**9)
    choice = choose_dtype(config, 5 * 10**9)
    assert choice.dtype == torch.bfloat16 and measured == []
    assert choice.reason == "bfloat16: 20.0 GB of weights in float32 do not fit the free 16.0 GB"
    for parameters in (10**9, 10**11, 0):  # both fit, neither does, unknown
        assert choose_dtype(config, parameters).dtype == torch.float32
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert choose_dtype(config, 5 * 10**9).dtype == torch.float32


def test_a_measurement_is_remembered_per_machine_torch_and_sizes(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = pretend(monkeypatch, FAST_BFLOAT16)
    assert remembered() == {}
    for sizes in ((64, 160), (64, 160), (32, 96)):
        assert layer_speed(*sizes) == FAST_BFLOAT16
    assert measured == [(64, 160), (32, 96)]
    assert remembered() == {(32, 96): FAST_BFLOAT16, (64, 160): FAST_BFLOAT16}
    for name in ("cpu_name", "cpu_flags"):
        with monkeypatch.context() as other:
            other.setattr(module, name, lambda: "another")
            assert remembered() == {}
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "0.0")
        assert remembered() == {}
    for file in (own_cache / "dtype").glob("*.json"):
        file.write_text('{"float32": 1')  # a damaged file is measured again
    assert layer_speed(64, 160) == FAST_BFLOAT16 and measured[2:] == [(64, 160)]


def test_a_cache_that_cannot_be_written_does_not_stop_loading(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.write_text("a file where the folder should be")
    measured = pretend(monkeypatch, FAST_FLOAT32)
    assert layer_speed(64, 160) == layer_speed(64, 160) == FAST_FLOAT32
    assert len(measured) == 2


@pytest.mark.parametrize("slower", [torch.float32, torch.bfloat16])
def test_the_measurement_finds_the_faster_dtype(slower: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.frozen_layer

    def fake(hidden: int, intermediate: int, dtype: torch.dtype) -> Any:
        layer = real(hidden, intermediate, torch.float32)

        def several(tokens: int) -> None:
            for _ in range(4 if dtype == slower else 1):
                layer(tokens)

        return several

    monkeypatch.setattr(module, "frozen_layer", fake)
    threads = torch.get_num_threads()
    speed = measure(256, 512)
    assert speed.faster != slower
    ratio = max(speed.float32, speed.bfloat16) / min(speed.float32, speed.bfloat16)
    assert 2.5 < ratio < 6
    assert torch.get_num_threads() == threads


def test_a_measurement_is_short_whatever_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in ((16, 32), (8192, 28672)):
        start = time.thread_time()
        measure(*sizes)
        assert time.thread_time() - start < 3 * module.SECONDS


def test_free_memory_respects_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(str(tmp_path / name) for name in ("limit", "used", "stat"))
    monkeypatch.setattr(machine, "CONTAINER_MEMORY", (files,))
    whole = machine.available_memory()
    assert whole is None or whole > 2**20
    for file, text in zip(files, ("1000", "700", "anon 1\ninactive_file 50\n"), strict=True):
        Path(file).write_text(text)
    assert machine.available_memory() == 350
    Path(files[0]).write_text("max")
    assert machine.available_memory() != 350


def test_info_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch, FAST_BFLOAT16)
    line = "bfloat16: 340 against 140 GFLOP/s per core in float32, measured on this machine"
    assert f"auto 576x1536      {line}" in run("info").output.splitlines()
    layer_speed(64, 160)
    assert f"auto 64x160        {line}" in run("info").output.splitlines()
    assert measured == [(576, 1536), (64, 160)]
