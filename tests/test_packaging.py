"""The contents of an sdist and a wheel, built in a copy of the tree by a Python without torch and a compiler."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")


def run_setup(tree: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of setuptools' build backend in the tree; importing torch or ninja there fails."""
    trap = tree / "trap"
    for name in ("torch", "ninja"):
        (trap / name).mkdir(parents=True, exist_ok=True)
        (trap / name / "__init__.py").write_text(f"raise ModuleNotFoundError('trapped {name}', name='{name}')")
    environment = {**os.environ, "PYTHONPATH": str(trap), "CXX": "no-such-compiler", **variables}
    environment.setdefault("SOFTPROMPT_FAST_BUILD", "0")
    line = f"import setuptools.build_meta as backend; backend.{command}"
    return subprocess.run([sys.executable, "-c", line], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__", "_prebuilt", "*.so", "*.egg-info")
    for entry in ("softprompt_fast", "csrc"):
        shutil.copytree(ROOT / entry, copy / entry, ignore=unwanted)
    for entry in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / entry).is_file():
            shutil.copy(ROOT / entry, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> list[str]:
    done = run_setup(tree, "build_sdist('out')")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return [name.split("/", 1)[-1] for name in opened.getnames()]


@pytest.fixture(scope="module")
def wheel(tree: Path) -> zipfile.ZipFile:
    done = run_setup(tree, "build_wheel('out')")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "out").glob("*.whl")
    return zipfile.ZipFile(archive)


def native_sources() -> set[str]:
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"csrc/ops.cpp", "csrc/cpu/kernels.cpp", "csrc/cuda/kernels.cu", "csrc/cuda/kernels.cuh"} <= sources
    return sources


def modules() -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "softprompt_fast").rglob("*.py")}


def test_sdist_carries_every_source(sdist: list[str]) -> None:
    assert native_sources() | modules() | {"LICENSE", "softprompt_fast/py.typed"} <= set(sdist)


def test_wheel_carries_every_source(wheel: zipfile.ZipFile) -> None:
    expected = {f"softprompt_fast/{name}" for name in native_sources()} | modules() | {"softprompt_fast/py.typed"}
    assert expected <= set(wheel.namelist())


def test_nothing_compiled_is_shipped(sdist: list[str], wheel: zipfile.ZipFile) -> None:
    unwanted = [
        name for name in sdist + wheel.namelist() if "_prebuilt" in name or name.endswith((".so", ".o", ".pyc"))
    ]
    assert not unwanted
    assert wheel.filename is not None and wheel.filename.endswith("-py3-none-any.whl")


def test_wheel_puts_nothing_beside_the_package(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"softprompt_fast"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    version = (ROOT / "softprompt_fast" / "base" / "version.py").read_text().split('__version__ = "')[1].split('"')[0]
    assert metadata["Version"] == version
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = metadata.get_all("Requires-Dist") or []
    plain = {line.split(";")[0].strip() for line in required if "extra ==" not in line}
    assert {"torch<2.15,>=2.10", "numpy", "ninja", "pybind11", "setuptools", "safetensors", "filelock"} <= plain
    assert {"transformers<5.25,>=5.0", "typer", "rich"} <= plain
    assert set(metadata.get_all("Provides-Extra") or []) >= {"train", "demo", "test", "dev"}
    scripts = wheel.read(path.replace("METADATA", "entry_points.txt")).decode()
    assert "softprompt-fast = softprompt_fast.cli:main" in scripts
    assert "softprompt-lm-eval = softprompt_fast.interop.lm_eval:main" in scripts
    assert "[lm_eval.models]\nsoftprompt = softprompt_fast.interop.lm_eval:SoftPromptLM" in scripts


def test_asking_for_a_build_without_torch_fails_loudly(tree: Path) -> None:
    done = run_setup(tree, "build_wheel('ahead')", SOFTPROMPT_FAST_BUILD="1")
    assert done.returncode != 0
    assert "SOFTPROMPT_FAST_BUILD=1" in done.stderr and "--no-build-isolation" in done.stderr
    assert not list((tree / "ahead").glob("*.whl"))
