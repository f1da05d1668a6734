"""Files that are no PEFT folder: pickles are refused, NumPy's and KoboldAI's are read, all others are named."""

from __future__ import annotations

import json
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import build
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank
from softprompt_fast.prompts import kobold_files
from softprompt_fast.prompts.vector_files import read_vectors

VALUES = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def npy(folder: Path, array: Any = None, name: str = "prompt.npy") -> Path:
    np.save(folder / name, VALUES.numpy() if array is None else array, allow_pickle=True)
    return folder / name


def bfloat16(values: Tensor) -> Any:
    """What NumPy stores of a bfloat16 array of JAX."""
    return values.to(torch.bfloat16).view(torch.int16).numpy().view("V2")


def kobold(folder: Path, array: Any = None, meta: str = '{"name": "a", "author": "b"}', **options: Any) -> Path:
    npy(folder, array, "tensor.npy")
    with zipfile.ZipFile(folder / "prompt.zip", "w", **options) as archive:
        archive.write(folder / "tensor.npy", "tensor.npy")
        archive.writestr("meta.json", meta)
    (folder / "tensor.npy").unlink()
    return folder / "prompt.zip"


def safetensors(folder: Path, array: Any = None) -> Path:
    save_file({"any": VALUES if array is None else torch.from_numpy(array)}, folder / "prompt.safetensors")
    return folder / "prompt.safetensors"


WRITERS = [npy, kobold, safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_a_prompt_wherever_one_can_be_given(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("init", init=path)
    tuned.add_prompt("text", init=str(path))
    tuned.load_prompt(path)
    assert tuned.prompts.names == ["init", "text", "prompt"]
    assert all(torch.equal(tuned.prompts[name], VALUES) for name in tuned.prompts.names)
    bank = PromptBank(build("llama"))
    bank.add("mine", path)
    bank.add("text", str(path))
    assert torch.equal(bank["mine"].cpu(), VALUES) and torch.equal(bank["text"].cpu(), VALUES)
    deep = spf.DeepPromptModel(build("llama"))
    assert deep.load_prompt(path).shape == (3, deep.prompts.embedding_dim)


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_with_keys_and_values_is_a_deep_prompt(write: Callable[..., Path], tmp_path: Path) -> None:
    deep = spf.DeepPromptModel(build("llama"))
    values = torch.randn(4, deep.prompts.embedding_dim)
    path = write(tmp_path, values.numpy())
    assert torch.equal(deep.load_prompt(path, "mine"), values)
    bank = PromptBank(build("llama"))
    bank.add("mine", path)
    assert torch.equal(bank["mine"], values)
    with pytest.raises(ValueError, match=r"must have shape \[P, 32\], got \[4, 96\]"):
        spf.SoftPromptModel(build("llama")).load_prompt(path)


@pytest.mark.parametrize("write", [npy, kobold])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (VALUES.double().numpy(), VALUES),
        (VALUES.half().numpy(), VALUES.half().float()),
        (bfloat16(VALUES), VALUES.bfloat16().float()),
        (VALUES.numpy().astype(">f4"), VALUES),
        (np.asfortranarray(VALUES.numpy()), VALUES),
    ],
    ids=["float64", "float16", "bfloat16", "big-endian", "Fortran"],
)
def test_types_of_numbers(write: Callable[..., Path], stored: Any, expected: Tensor, tmp_path: Path) -> None:
    got = read_vectors(write(tmp_path, stored))
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("write", [npy, kobold])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), r"must hold an array \[P, D\] of float16, .*, got float32 \[3\]"),
        (np.zeros((0, 4), np.float32), r"got float32 \[0, 4\]"),
        (np.zeros((2, 4), np.uint16), r"got uint16 \[2, 4\]"),
        (np.zeros((2, 4), np.complex64), r"got complex64 \[2, 4\]"),
        (np.zeros((2, 4), [("a", np.float16)]), r"must hold an array \[P, D\]"),
        (np.full((2, 4), np.nan, np.float32), "must hold finite numbers, got NaN or infinity"),
        (np.full((2, 4), np.inf, np.float16), "must hold finite numbers"),
    ],
    ids=["one-dimensional", "empty", "integers", "complex", "structured", "NaN", "infinity"],
)
def test_other_arrays_are_refused(write: Callable[..., Path], array: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_vectors(write(tmp_path, array))


@pytest.mark.parametrize("write", [npy, kobold])
def test_objects_in_an_array_are_not_unpickled(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path, np.array([[Trap(tmp_path / "ran")]], dtype=object))
    with pytest.raises(ValueError, match=r"must hold an array \[P, D\] .*, got object \[1, 1\]"):
        read_vectors(path)
    assert not (tmp_path / "ran").exists()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 4096), }"), "bytes of numbers, got 0"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }"), "must hold"),
        (header("(" * 9000), "must be a .npy file"),
        (header(" " * 60000), "must be a .npy file: Header info length"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 8, "must be a .npy file"),
        (b"\x93NUMPY\x07\x00" + b"\x00" * 64, r"must be a .npy file: version \(7, 0\) of the format is not read"),
        (b"\x93NUMPY", "must be a .npy file"),
    ],
    ids=["huge", "negative", "nested", "long-header", "torn-header", "version", "torn"],
)
def test_damaged_arrays_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "bad.npy")


def test_archives_are_unpacked_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kobold(tmp_path, np.zeros((2000, 512), np.float32), compression=zipfile.ZIP_DEFLATED)
    assert read_vectors(path).shape == (2000, 512)
    monkeypatch.setitem(kobold_files.LIMITS, "tensor.npy", 1 << 20)
    with pytest.raises(ValueError, match=r"tensor.npy must be stored or deflated and have at most 1048576 bytes, got"):
        read_vectors(path)
    content = path.read_bytes()
    lies = content.replace((4096128).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lies != content
    path.write_bytes(lies)
    with pytest.raises(ValueError, match=r"must be a soft prompt of KoboldAI: Bad CRC|bytes of numbers, got"):
        read_vectors(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_a_limit_are_refused(method: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be stored or deflated"):
        read_vectors(kobold(tmp_path, compression=method))


@pytest.mark.parametrize("meta", ["[]", "{", "", "[" * 100_000, "\xff"])
def test_an_archive_must_describe_itself(meta: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"meta.json must be a JSON object"):
        read_vectors(kobold(tmp_path, meta=meta))


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    save_file({"any": VALUES}, path, {"note": ""})
    missing = 640 - int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"any": VALUES}, path, {"note": "x" * missing})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_vectors(path), VALUES)


def other_files(folder: Path) -> dict[str, Path]:
    """Files that are no prompt, by what the error says of them."""
    np.savez(folder / "arrays.npz", VALUES.numpy())
    (folder / "empty").touch()
    (folder / "text.json").write_text('{"tensor": []}')
    (folder / "gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 32)
    (folder / "torn.zip").write_bytes(b"PK\x03\x04" + b"\x00" * 20)
    return {
        "a zip archive with the files ['arr_0.npy']": folder / "arrays.npz",
        "an empty file": folder / "empty",
        "a file that begins with b'{\"tensor'": folder / "text.json",
        r"a file that begins with b'GGUF\x03\x00\x00\x00'": folder / "gguf",
        r"a file that begins with b'PK\x03\x04\x00\x00\x00\x00'": folder / "torn.zip",
    }


def test_other_files_are_named(tmp_path: Path) -> None:
    for found, path in other_files(tmp_path).items():
        expected = (
            f"{path} must be a prompt's folder, a .safetensors or .npy file with one tensor, or a soft prompt of "
            f"KoboldAI, got {found}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            spf.SoftPromptModel(build("llama")).add_prompt("new", init=path)
    with pytest.raises(FileNotFoundError, match="got a file, which only `init`"):
        spf.SoftPromptModel.from_pretrained(build("llama"), npy(tmp_path))


@pytest.mark.parametrize("write", WRITERS)
def test_any_damage_is_one_line_or_harmless(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    at, refused = random.Random(0), 0
    header = [place for place in range(len(whole)) if place < 300 or place > len(whole) - 300]
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(at.randrange(1, 4)):
            damaged[at.choice(header)] = at.randrange(256)
        path.write_bytes(damaged if at.random() < 0.9 else damaged[: at.randrange(len(damaged))])
        try:
            assert read_vectors(path).dim() == 2
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 100


# --- pickles ---


def write_pickle(path: Path, values: Any, kind: str) -> Path:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["prompt.bin", "prompt.pt", "prompt.npy", "prompt.safetensors"])
def test_pickles_are_refused_and_not_read(kind: str, name: str, tmp_path: Path) -> None:
    path = write_pickle(tmp_path / name, {"prompt_embeddings": Trap(tmp_path / "ran")}, kind)
    tuned, bank = spf.SoftPromptModel(build("llama")), PromptBank(build("llama"))
    for read in (tuned.load_prompt, lambda path: tuned.add_prompt("x", init=path), lambda path: bank.add("x", path)):
        with pytest.raises(ValueError, match="got a pickle, which could run any code; convert it: python -c"):
            read(path)
    assert not (tmp_path / "ran").exists()


def convert(error: BaseException) -> subprocess.CompletedProcess[str]:
    """Runs the command that an error names."""
    words = shlex.split(str(error).split("convert it: ")[1])
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)


def test_the_command_converts_a_folder(tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("one", init=VALUES)
    tuned.save_pretrained(tmp_path / "it's a folder")
    folder = tmp_path / "it's a folder" / "one"
    weights = folder / "adapter_model.safetensors"
    write_pickle(folder / "adapter_model.bin", load_file(weights), "zip")
    weights.unlink()
    fresh, bank = spf.SoftPromptModel(build("llama")), PromptBank(build("llama"))
    reads: list[Callable[[Path], Any]] = [
        fresh.load_prompt,
        lambda path: fresh.add_prompt("x", init=path),
        lambda path: spf.SoftPromptModel.from_pretrained(build("llama"), path),
        lambda path: spf.SoftPromptModel.from_pretrained(build("llama"), path.parent),
        lambda path: bank.add("x", path),
        bank.add_directory,
    ]
    for read in reads:
        with pytest.raises(ValueError, match=r"adapter_model.bin must be a safetensors file, got a pickle") as caught:
            read(folder)
    result = convert(caught.value)
    assert result.returncode == 0, result.stderr
    assert torch.equal(fresh.load_prompt(folder), VALUES)


def test_the_command_converts_one_tensor_and_runs_no_code(tmp_path: Path) -> None:
    good = write_pickle(tmp_path / "good.pt", torch.nn.Parameter(VALUES.T.contiguous().T), "zip")
    with pytest.raises(ValueError, match="got a pickle") as caught:
        read_vectors(good)
    assert convert(caught.value).returncode == 0
    assert torch.equal(read_vectors(tmp_path / "good.safetensors"), VALUES)
    bad = write_pickle(tmp_path / "bad.pt", {"prompt_embeddings": Trap(tmp_path / "ran")}, "zip")
    with pytest.raises(ValueError, match="got a pickle") as caught:
        read_vectors(bad)
    result = convert(caught.value)
    assert result.returncode != 0 and "weights_only" in result.stderr and not (tmp_path / "ran").exists()


def test_pickles_beside_other_prompts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("one", init=VALUES)
    tuned.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "adapter_model.safetensors").rename(tmp_path / "two" / "adapter_model.bin")
    assert spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path).prompts.names == ["one"]
    assert f"{tmp_path / 'two' / 'adapter_model.bin'} must be a safetensors file, got a pickle" in caplog.text


def test_a_broken_folder_does_not_hide_others(tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("one", init=VALUES)
    tuned.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "adapter_config.json").write_text("{")
    assert spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path, ["one"]).prompts.names == ["one"]
    with pytest.raises(ValueError, match="must be JSON"):
        spf.SoftPromptModel.from_pretrained(build("llama"), tmp_path)


def test_a_large_configuration_is_refused(tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("one", init=VALUES)
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "one" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": "x" * (1 << 20)}))
    with pytest.raises(ValueError, match=r"adapter_config.json must have at most 1048576 bytes, got 1048"):
        tuned.load_prompt(tmp_path / "one")
