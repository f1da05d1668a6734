"""Finds, builds, caches and loads the native extension. Imports torch only in the functions that need it.

A build lives in ``<cache>/build/<key>/``; the key is a hash of everything that could make it wrong: sources, flags,
torch, CUDA, Python, GPU architectures and, because the code is tuned to it, the CPU. It is compiled in a private
directory and renamed into place. A lock of the operating system, released when its process ends, protects this.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

NAME = "softprompt_fast_native"
NAMESPACE = "softprompt_fast"
LOCK_SECONDS = 900
PACKAGE = Path(__file__).resolve().parents[2]
"""The folder of softprompt_fast."""


class BuildUnavailable(RuntimeError):
    """The native extension is not available here; the message says why and what to do."""


def source_directory() -> Path:
    """``csrc/`` of the installed package, or of the source tree it is imported from."""
    package = PACKAGE
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "ops.cpp").is_file():
            return candidate
    raise BuildUnavailable(
        f"the C++ sources were not installed: no csrc/ops.cpp in {package} or {package.parent}; reinstall the package"
    )


def cache_directory() -> Path:
    """Where builds and downloads are kept: ``SOFTPROMPT_FAST_CACHE`` or the user's cache directory."""
    if configured := os.environ.get("SOFTPROMPT_FAST_CACHE"):
        return Path(configured).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "softprompt_fast"


def cuda_toolkit() -> str | None:
    """Home of the CUDA toolkit, found without importing torch's build code."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent.parent if nvcc else None
    configured = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes = [Path(home) for home in (*configured, beside, "/usr/local/cuda") if home]
    with_nvcc = [home for home in homes if (home / "bin" / "nvcc").exists()]
    # An nvcc on PATH may be a script that starts the real one: its parent has no headers.
    with_headers = [
        home for home in with_nvcc if any(home.glob("include/cuda_runtime.h")) or any(home.glob("targets/*/include"))
    ]
    return next((str(home) for home in with_headers + with_nvcc), None)


def _architectures() -> list[str]:
    """GPU architectures to build for, sorted: ``TORCH_CUDA_ARCH_LIST`` or those of the visible GPUs."""
    import torch

    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return sorted(set(listed.replace(";", " ").split()))
    if not torch.cuda.is_available():
        return []
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(capabilities)]


def _cpu_identity() -> str:
    """The facts that ``-march=native`` depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.machine() + platform.processor()


@dataclass(frozen=True)
class BuildPlan:
    """One possible build: its sources, its flags, and the key under which the result is kept."""

    sources: tuple[str, ...]
    cflags: tuple[str, ...]
    cuda_cflags: tuple[str, ...]
    ldflags: tuple[str, ...]
    architectures: tuple[str, ...]
    key: str = field(compare=False)

    @property
    def with_cuda(self) -> bool:
        return bool(self.architectures)


def plan(*, cuda: bool = True, extra_sources: tuple[Path, ...] = (), namespace: str = NAMESPACE) -> BuildPlan:
    """The build for this interpreter, torch and machine.

    Args:
        cuda: compile the CUDA kernels too, where torch, a toolkit and an architecture allow it.
        extra_sources: files that replace the CPU kernels (the tests run CUDA thread code this way).
        namespace: of the registered ops.
    """
    import torch

    root = source_directory()
    architectures: list[str] = []
    if cuda and torch.version.cuda and cuda_toolkit():
        architectures = _architectures()
    sources = sorted(root.glob("*.cpp"))
    sources += list(extra_sources) or sorted((root / "cpu").glob("*.cpp"))
    cflags = ["-O3", f"-DSOFTPROMPT_FAST_NAMESPACE={namespace}", f"-I{root}"]
    ldflags = []
    if sys.platform == "linux":
        cflags += ["-march=native", "-fopenmp"]
        ldflags += ["-fopenmp"]
    further = shlex.split(os.environ.get("SOFTPROMPT_FAST_CXXFLAGS", ""))  # a sanitizer's go to both steps
    cflags += further
    ldflags += further
    cuda_cflags: list[str] = []
    if architectures:
        sources += [root / "cuda" / "register_cuda.cpp", root / "cuda" / "kernels.cu"]
        cflags += [f"-DSOFTPROMPT_FAST_CUDA={torch.version.cuda}"]
        cuda_cflags = ["-O3"]
    digest = hashlib.sha256()
    beside = {path for source in extra_sources for path in source.parent.iterdir()}  # their headers
    for path in sorted(root.rglob("*")) + sorted(beside):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    shown = [flag for flag in cflags if not flag.startswith("-I")]
    facts = [
        shown,
        cuda_cflags,
        ldflags,
        torch.__version__,
        torch.version.cuda,
        sys.version,
        architectures,
        _cpu_identity(),
    ]
    digest.update(json.dumps(facts).encode())
    return BuildPlan(
        sources=tuple(map(str, sources)),
        cflags=tuple(cflags),
        cuda_cflags=tuple(cuda_cflags),
        ldflags=tuple(ldflags),
        architectures=tuple(architectures),
        key=digest.hexdigest()[:20],
    )


def _say(message: str) -> None:
    print(f"softprompt_fast: {message}", file=sys.stderr, flush=True)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise BuildUnavailable(f"{path} does not load ({error}); `softprompt-fast clean` removes it") from error
    return module


def library_path(directory: Path) -> Path:
    return directory / f"{NAME}.so"


def find(build: BuildPlan) -> Path | None:
    """The finished build, made at installation or cached by an earlier process."""
    ahead = PACKAGE / "_prebuilt" / build.key
    for directory in (ahead, cache_directory() / "build" / build.key):
        if library_path(directory).is_file():
            return library_path(directory)
    return None


def compiler() -> str | None:
    """The C++ compiler that would be used, as torch chooses it."""
    command = shlex.split(os.environ.get("CXX", "c++"))  # may be "ccache g++"
    return shutil.which(command[0]) if command else None


def _why(build: BuildPlan) -> str:
    """Why this build is needed, in words: the first one, or what changed since the last."""
    builds = sorted((cache_directory() / "build").glob("*/build.json"), key=lambda p: p.stat().st_mtime)
    if not builds:
        return "first use"
    import torch

    last = json.loads(builds[-1].read_text())
    now = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    changed = [f"{name} {last.get(name)} -> {value}" for name, value in now.items() if last.get(name) != value]
    if last.get("architectures") != list(build.architectures):
        changed.append(f"GPU architectures {last.get('architectures')} -> {list(build.architectures)}")
    return ", ".join(changed) or "the sources, flags or CPU changed"


def first_error(output: str) -> str:
    """The first real compiler message in what ninja printed."""
    for line in output.splitlines():
        if re.search(r"\b(fatal )?error\b\s*:|undefined reference|cannot find -l|: not found", line):
            return line.strip()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "the compiler gave no message"


def _build_environment(build: BuildPlan) -> dict[str, str]:
    """ninja on PATH, and an architecture list even where torch would look for a GPU."""
    import ninja

    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([ninja.BIN_DIR, environment.get("PATH", "")])
    if build.architectures:
        environment["TORCH_CUDA_ARCH_LIST"] = " ".join(build.architectures)
        environment["CUDA_HOME"] = str(cuda_toolkit())
    return environment


def compile_into(build: BuildPlan, directory: Path) -> Path:
    """Compiles into an empty directory and returns the library. Raises BuildUnavailable with the first error.

    A separate process compiles, so that neither its environment nor a half-loaded library affects this one.
    """
    arguments = {
        "name": NAME,
        "sources": build.sources,
        "extra_cflags": build.cflags,
        "extra_cuda_cflags": build.cuda_cflags,
        "extra_ldflags": build.ldflags,
        "build_directory": str(directory),
        "with_cuda": build.with_cuda,
        "is_python_module": False,
        "verbose": True,
    }
    log = directory / "build.log"
    with log.open("w") as output:
        finished = subprocess.run(
            [sys.executable, __file__, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_build_environment(build),
        )
    if finished.returncode != 0 or not library_path(directory).is_file():
        raise BuildUnavailable(first_error(log.read_text(errors="replace")))
    for leftover in [*directory.glob("*.o"), directory / "lock"]:
        leftover.unlink(missing_ok=True)
    return library_path(directory)


def _fail(build: BuildPlan, reason: str, output: Path | None) -> BuildUnavailable:
    """Records a failed compilation for later processes; the error says what to do."""
    root = cache_directory() / "build"
    kept = root / f"{build.key}.failed.log"
    if output is not None and output.is_file():
        shutil.copyfile(output, kept)
    (root / f"{build.key}.failed.json").write_text(json.dumps({"error": reason, "compiler": compiler()}))
    return BuildUnavailable(
        f"the extension did not compile: {reason} (full output: {kept}). Fix the compiler and run "
        "`softprompt-fast build`, or set SOFTPROMPT_FAST_BACKEND=reference to use plain PyTorch without this warning"
    )


def ensure(build: BuildPlan | None = None, *, retry: bool = False) -> Path:
    """Path of the finished library; compiles it if there is none yet.

    Args:
        retry: try again even if an earlier process failed at the same build.

    Raises:
        BuildUnavailable: no compiler, building switched off, or a failed compilation.
    """
    from filelock import FileLock, Timeout

    build = build or plan()
    if found := find(build):
        return found
    if os.environ.get("SOFTPROMPT_FAST_BUILD") == "0":
        raise BuildUnavailable("SOFTPROMPT_FAST_BUILD=0 forbids compiling, and no finished build was found")
    if compiler() is None:
        wanted = os.environ.get("CXX", "c++")
        raise BuildUnavailable(f"no C++ compiler: {wanted!r} is not on PATH. Install one (Debian: apt-get install g++)")
    root = cache_directory() / "build"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{build.key}.lock", timeout=LOCK_SECONDS)
        with lock:
            if found := find(build):  # another process was faster
                return found
            failed = root / f"{build.key}.failed.json"
            if failed.is_file() and not retry:
                earlier = json.loads(failed.read_text())
                if earlier.get("compiler") == compiler():
                    raise BuildUnavailable(
                        f"an earlier build failed: {earlier.get('error')} (full output: "
                        f"{failed.with_suffix('.log')}). `softprompt-fast build` tries again"
                    )
            return _build_locked(build, root)
    except Timeout as error:
        raise BuildUnavailable(f"another process has been building for {LOCK_SECONDS} s") from error
    except OSError as error:
        raise BuildUnavailable(f"the cache {root} cannot be used: {error}. Set SOFTPROMPT_FAST_CACHE") from error


def _build_locked(build: BuildPlan, root: Path) -> Path:
    import torch

    for stale in root.glob(f".{build.key}-*"):  # left by a process that was killed; we hold its lock
        shutil.rmtree(stale, ignore_errors=True)
    target = f"CPU and CUDA {torch.version.cuda} ({', '.join(build.architectures)})" if build.with_cuda else "CPU"
    _say(f"compiling the native extension for {target}, torch {torch.__version__}; reason: {_why(build)}")
    start = time.perf_counter()
    staging = Path(tempfile.mkdtemp(prefix=f".{build.key}-", dir=root))
    try:
        try:
            compile_into(build, staging)
        except BuildUnavailable as error:
            raise _fail(build, str(error), staging / "build.log") from error
        facts = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "architectures": list(build.architectures),
            "seconds": round(time.perf_counter() - start, 1),
        }
        (staging / "build.json").write_text(json.dumps(facts))
        final = root / build.key
        shutil.rmtree(final, ignore_errors=True)  # half removed by hand: it contains no library
        os.replace(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for note in root.glob(f"{build.key}.failed.*"):
        note.unlink(missing_ok=True)
    _say(f"compiled in {time.perf_counter() - start:.1f} s, kept in {final}")
    return library_path(final)


def load(*, retry: bool = False) -> ModuleType:
    """The loaded extension; its ops are then in ``torch.ops.softprompt_fast``.

    If a GPU is present but the CUDA part does not compile, the CPU part is built alone.
    """
    wanted = plan()
    try:
        return _import(ensure(wanted, retry=retry))
    except BuildUnavailable as error:
        if not wanted.with_cuda:
            raise
        _say(f"building without CUDA: {error}")
        return _import(ensure(plan(cuda=False), retry=retry))


def clean() -> list[Path]:
    """Removes every cached build; returns what was removed."""
    root = cache_directory() / "build"
    removed = sorted(root.iterdir()) if root.is_dir() else []
    shutil.rmtree(root, ignore_errors=True)
    return removed


if __name__ == "__main__":  # the process that compile_into starts
    sys.path.pop(0)  # the package's own directory, whose modules must not hide others
    from torch.utils import cpp_extension

    cpp_extension.load(**json.loads(sys.argv[1]))
