"""Packaging. Needs neither torch nor a compiler, unless SOFTPROMPT_FAST_BUILD=1 asks for the extension ahead of its first use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
AHEAD = os.environ.get("SOFTPROMPT_FAST_BUILD") == "1"
SOURCES = ["softprompt_fast.csrc", "softprompt_fast.csrc.cpu", "softprompt_fast.csrc.cuda"]


def load_build() -> ModuleType:
    """softprompt_fast/ops/extension/build.py by its path: importing the package would import torch."""
    name = "softprompt_fast_build"
    spec = importlib.util.spec_from_file_location(name, ROOT / "softprompt_fast" / "ops" / "extension" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def build_ahead(package: Path) -> None:
    """Compiles the build of the first use, into the folder where ``build.find`` looks first."""
    build = load_build()
    asked = "SOFTPROMPT_FAST_BUILD=1 builds the extension during installation, but"
    try:
        import ninja  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"{asked} {error.name} cannot be imported: install torch and ninja first and pass --no-build-isolation, "
            "or unset the variable to build on first use"
        ) from error
    if build.compiler() is None:
        raise SystemExit(f"{asked} there is no C++ compiler (CXX={os.environ.get('CXX', 'c++')}): install one")
    plan = build.plan()
    directory = package / "_prebuilt" / plan.key
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        library = build.compile_into(plan, directory)
    except build.BuildUnavailable as error:
        log = (directory / "build.log").read_text(errors="replace")
        raise SystemExit(f"{log}\n{asked} it did not compile: {error}") from error
    for file in directory.iterdir():
        if file != library:
            file.unlink()


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if AHEAD:
            build_ahead(ROOT / "softprompt_fast" if self.editable_mode else Path(self.build_lib, "softprompt_fast"))


class PlatformDistribution(Distribution):
    """A wheel that holds a library is for this platform and interpreter only."""

    def has_ext_modules(self) -> bool:
        return AHEAD


setup(
    packages=find_packages(include=["softprompt_fast", "softprompt_fast.*"]) + SOURCES,
    package_dir={"softprompt_fast.csrc": "csrc"},
    package_data={"softprompt_fast": ["py.typed"], **{name: ["*.h", "*.cuh", "*.cpp", "*.cu"] for name in SOURCES}},
    cmdclass={"build_py": BuildPackage},
    distclass=PlatformDistribution,
)
