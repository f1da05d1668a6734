"""The CUDA sources compile without a warning, on any machine with a CUDA toolkit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from softprompt_fast.ops.extension import build

TOOLKIT = build.cuda_toolkit()
pytestmark = pytest.mark.skipif(TOOLKIT is None, reason="no nvcc: no CUDA toolkit on PATH or under CUDA_HOME")


def run(*command: str | Path) -> None:
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("architecture, standard", [("80", "c++17"), ("90", "c++20"), ("100", "c++20")])
def test_kernels_compile(tmp_path: Path, architecture: str, standard: str) -> None:
    nvcc = Path(str(TOOLKIT)) / "bin" / "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    flags = (*cpp_extension.COMMON_NVCC_FLAGS, "-O3", f"-std={standard}", f"-arch=sm_{architecture}")
    warnings = ("-Werror", "all-warnings")
    source = build.source_directory() / "cuda" / "kernels.cu"
    run(nvcc, "-c", *flags, *warnings, "-o", tmp_path / "kernels.o", source)
    assert (tmp_path / "kernels.o").stat().st_size > 0


def test_registration_compiles(tmp_path: Path) -> None:
    """By the host compiler. A torch built for CPUs lacks one generated header, which tells how CUDA was built."""
    compiler = build.compiler()
    headers = Path(str(TOOLKIT)) / "include"
    if compiler is None or not (headers / "cuda_runtime_api.h").is_file():
        pytest.skip("no C++ compiler, or no headers in the CUDA toolkit")
    includes = [Path(path) for path in cpp_extension.include_paths()]
    generated = Path("c10") / "cuda" / "impl" / "cuda_cmake_macros.h"
    if not any((path / generated).is_file() for path in includes):
        (tmp_path / generated).parent.mkdir(parents=True)
        (tmp_path / generated).write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    flags = ("-fsyntax-only", "-std=c++20", "-Werror", f"-DSOFTPROMPT_FAST_NAMESPACE={build.NAMESPACE}")
    system = [word for path in (*includes, headers, tmp_path) for word in ("-isystem", path)]
    run(compiler, *flags, *system, build.source_directory() / "cuda" / "register_cuda.cpp")
    assert torch.version.cuda is None or not (tmp_path / "c10").exists()
