"""Building, caching and loading the extension, and what happens where that fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import softprompt_fast
from softprompt_fast.ops.extension import build

ROOT = Path(softprompt_fast.__file__).parents[1]
USE = """
import torch, softprompt_fast
from softprompt_fast.ops.extension import backend
for _ in range(3):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = softprompt_fast.assemble(ids, torch.ones(4, 5), torch.ones(2, 5), [0, 2])
assert batch.inputs_embeds.shape == (2, 5, 5) and batch.inputs_embeds.all()
print(backend.state().name)
"""
WARNING = "the plain-PyTorch implementation is used: "
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def start(code: str, **environment: Any) -> subprocess.Popen[str]:
    """A Python process of its own group that sees no GPU, and only these settings of the package."""
    outside = ("SOFTPROMPT_FAST", "TORCH_CUDA_ARCH_LIST")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    settings = {"CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in environment.items()}}
    return spawn(code, inherited | settings)


def spawn(code: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed as a result, and what it said."""
    output, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    return output.strip(), messages


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@needs_compiler
@pytest.mark.slow
def test_a_killed_build_does_no_harm_and_two_processes_share_the_next(cache: Path) -> None:
    killed = start(USE, SOFTPROMPT_FAST_CACHE=cache)
    end = time.monotonic() + 120
    while not list(cache.glob("build/.*/build.ninja")):  # the compiler starts right after this file is written
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(cache.glob("build/.*")) and not list(cache.glob("build/*/*.so"))

    both = [start(USE, SOFTPROMPT_FAST_CACHE=cache) for _ in range(2)]
    results, messages = zip(*map(finish, both), strict=True)
    assert results == ("native", "native")
    assert sorted(text.count("compiling the native extension") for text in messages) == [0, 1]
    assert not any(WARNING in text for text in messages)
    assert not list(cache.glob("build/.*")), "what the killed process left is still there"
    assert len(list(cache.glob("build/*/*.so"))) == 1


def test_loading_from_the_cache_is_fast(native: object) -> None:
    code = (
        "import time; from softprompt_fast.ops.extension import backend; "
        "start = time.perf_counter(); name = backend.state().name"
    )
    fast, _ = finish(
        spawn(f"{code}; print(name, time.perf_counter() - start)", {**os.environ, "SOFTPROMPT_FAST_BUILD": "0"})
    )
    name, seconds = fast.split()
    assert name == "native"
    assert float(seconds) < 1


def test_threads_that_make_the_first_call_together_hear_one_warning(cache: Path) -> None:
    code = """
import threading, torch
from concurrent.futures import ThreadPoolExecutor
from softprompt_fast import assemble
start = threading.Barrier(8)
def call(_):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    start.wait()
    return assemble(ids, torch.ones(4, 5), torch.ones(2, 5), [0, 2]).inputs_embeds.sum()
with ThreadPoolExecutor(8) as pool:
    print({float(result) for result in pool.map(call, range(8))})
"""
    result, messages = finish(start(code, SOFTPROMPT_FAST_CACHE=cache, CXX="/nonexistent/c++"))
    assert result == "{50.0}"
    assert messages.count(WARNING) == 1


def test_importing_builds_nothing(cache: Path) -> None:
    heavy = ["torch.utils.cpp_extension", "torch._dynamo", "setuptools", "ninja", "softprompt_fast_native"]
    code = f"import sys, softprompt_fast; print([name for name in {heavy} if name in sys.modules])"
    assert finish(start(code, SOFTPROMPT_FAST_CACHE=cache)) == ("[]", "")
    assert not cache.exists()


def test_without_a_compiler_the_twin_works(cache: Path) -> None:
    result, messages = finish(start(USE, SOFTPROMPT_FAST_CACHE=cache, CXX="/nonexistent/c++"))
    assert result == "reference"
    assert messages.splitlines() == [messages.strip()], "more than one line"
    assert messages.startswith(WARNING + "no C++ compiler: '/nonexistent/c++' is not on PATH")


def test_a_failing_compiler_is_reported_once_and_remembered(cache: Path, tmp_path: Path) -> None:
    calls, script = tmp_path / "calls", tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in -v|--version|-dump*) exec {shutil.which("c++") or "true"} "$@";; esac\n'
        f'echo "$@" >> {calls}\n'
        'echo "x.cpp:3:5: error: boom"\n'
        "exit 1\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    result, messages = finish(start(USE, SOFTPROMPT_FAST_CACHE=cache, CXX=script))
    assert result == "reference"
    (warning,) = [line for line in messages.splitlines() if line.startswith(WARNING)]
    (log,) = cache.glob("build/*.failed.log")
    assert "did not compile: x.cpp:3:5: error: boom" in warning and str(log) in warning
    assert "boom" in log.read_text()

    compiled = calls.read_text()
    result, messages = finish(start(USE, SOFTPROMPT_FAST_CACHE=cache, CXX=script))
    assert result == "reference"
    assert calls.read_text() == compiled, "the second process compiled again"
    (warning,) = messages.splitlines()
    assert warning.startswith(WARNING + "an earlier build failed: x.cpp:3:5: error: boom") and str(log) in warning


def test_building_can_be_forbidden(cache: Path) -> None:
    result, messages = finish(start(USE, SOFTPROMPT_FAST_CACHE=cache, SOFTPROMPT_FAST_BUILD=0))
    assert result == "reference"
    assert messages.startswith(WARNING + "SOFTPROMPT_FAST_BUILD=0 forbids compiling")
    assert not cache.exists()


def test_the_twin_can_be_chosen_quietly(cache: Path) -> None:
    assert finish(start(USE, SOFTPROMPT_FAST_CACHE=cache, SOFTPROMPT_FAST_BACKEND="reference")) == ("reference", "")
    assert not cache.exists()


@pytest.mark.parametrize(
    "choice, error",
    [
        ("native", "BuildUnavailable: no C++ compiler"),
        ("nonsense", "ValueError: SOFTPROMPT_FAST_BACKEND must be one of auto, native, reference, got 'nonsense'"),
    ],
)
def test_a_backend_that_cannot_be_had_is_an_error(cache: Path, choice: str, error: str) -> None:
    process = start(USE, SOFTPROMPT_FAST_CACHE=cache, SOFTPROMPT_FAST_BACKEND=choice, CXX="/nonexistent/c++")
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error in messages.splitlines()[-1]


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("SOFTPROMPT_FAST_BUILD", raising=False)
    with pytest.raises(build.BuildUnavailable, match=r"the cache .*file/build cannot be used: .*SOFTPROMPT_FAST_CACHE"):
        build.ensure()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change."""
    copy = tmp_path / "csrc"
    shutil.copytree(build.source_directory(), copy)
    monkeypatch.setattr(build, "source_directory", lambda: copy)
    return copy


def test_the_key_is_that_of_the_content(sources: Path) -> None:
    key = build.plan().key
    for path in sources.rglob("*"):
        os.utime(path, (0, 0))
    assert build.plan().key == key


@pytest.mark.parametrize("name", ["rows.h", "ops.cpp", "cpu/kernels.cpp", "cuda/kernels.cuh", "cuda/kernels.cu"])
def test_the_key_changes_with_every_source(sources: Path, name: str) -> None:
    key = build.plan().key
    (sources / name).write_text((sources / name).read_text() + "\n")
    assert build.plan().key != key


def test_the_key_changes_with_the_headers_of_extra_sources(tmp_path: Path) -> None:
    source, header = tmp_path / "extra.cpp", tmp_path / "extra.h"
    source.touch()
    header.touch()
    key = build.plan(extra_sources=(source,)).key
    header.write_text("// changed")
    assert key != build.plan(extra_sources=(source,)).key


@pytest.mark.parametrize(
    "target, name, value",
    [
        (torch, "__version__", "0.0"),
        (torch.version, "cuda", "0.0"),
        (sys, "version", "0.0"),
        (sys, "platform", "other"),  # and with it the flags
        (build, "_cpu_identity", lambda: "other"),
    ],
    ids=["torch", "cuda", "python", "flags", "cpu"],
)
def test_the_key_changes_with_the_machine(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any) -> None:
    key = build.plan(cuda=False).key
    monkeypatch.setattr(target, name, value)
    assert build.plan(cuda=False).key != key


def test_further_flags_make_a_build_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build.plan(cuda=False).key
    monkeypatch.setenv("SOFTPROMPT_FAST_CXXFLAGS", "-g -fsanitize=address")
    plan = build.plan(cuda=False)
    assert plan.key != key and plan.cflags[-2:] == plan.ldflags[-2:] == ("-g", "-fsanitize=address")


def test_the_key_changes_with_the_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "cuda_toolkit", lambda: "/toolkit")
    plans = {}
    for listed in ("8.0", "9.0", "9.0;8.0", "8.0 9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        plans[listed] = build.plan()
    assert len({plan.key for plan in plans.values()}) == 3
    assert plans["9.0;8.0"] == plans["8.0 9.0"] and plans["8.0 9.0"].architectures == ("8.0", "9.0")
    assert all(plan.with_cuda and any("kernels.cu" in name for name in plan.sources) for plan in plans.values())
    # Object files are named after their sources: two of one name would be one file.
    objects = [Path(name).stem + ".cuda" * name.endswith(".cu") for name in plans["9.0"].sources]
    assert len(set(objects)) == len(objects), objects


def test_the_reason_of_a_build_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(cache))
    plan = build.plan(cuda=False)
    assert build._why(plan) == "first use"
    last = cache / "build" / "earlier" / "build.json"
    last.parent.mkdir(parents=True)
    python = sys.version.split()[0]
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": python, "architectures": []}
    last.write_text(json.dumps(facts))
    assert build._why(plan) == "the sources, flags or CPU changed"
    last.write_text(json.dumps(facts | {"torch": "2.9.0", "architectures": ["9.0"]}))
    assert build._why(plan) == f"torch 2.9.0 -> {torch.__version__}, GPU architectures ['9.0'] -> []"


@pytest.mark.parametrize(
    "output, expected",
    [
        ("[1/2] c++ a.cpp\nFAILED: a.o\na.cpp:3:5: error: boom\n1 error generated.", "a.cpp:3:5: error: boom"),
        ("a.cpp:1:10: fatal error: torch.h: No such file", "a.cpp:1:10: fatal error: torch.h: No such file"),
        ("kernels.cu(7): error: identifier", "kernels.cu(7): error: identifier"),
        ("ld: x.o: undefined reference to `f'", "ld: x.o: undefined reference to `f'"),
        ("/bin/sh: 1: nvcc: not found", "/bin/sh: 1: nvcc: not found"),
        ("-Werror=x -o error_handler.o\nsomething else\n\n", "something else"),
        ("", "the compiler gave no message"),
    ],
)
def test_the_first_error_is_found(output: str, expected: str) -> None:
    assert build.first_error(output) == expected


@pytest.mark.parametrize("command, found", [("ccache g++", "ccache"), ("", None), ("/nonexistent/c++", None)])
def test_the_compiler_may_be_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, found: str | None
) -> None:
    (tmp_path / "ccache").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", command)
    assert build.compiler() == (None if found is None else str(tmp_path / found))


def test_a_toolkit_is_found_through_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("script", "toolkit"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").touch(mode=0o755)
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "script" / "bin"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.cuda_toolkit() == str(tmp_path / "toolkit")
