"""What this installation is made of; printed by ``softprompt-fast info`` and asked for in bug reports."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata

from ..ops.extension import backend as _library
from ..ops.extension import build as _build

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "ninja", "pybind11", "safetensors")


def report() -> dict[str, str]:
    """Names and values in the order in which they are printed. Settles the backend, so it may compile."""
    import torch

    from ..base.version import __version__

    facts = {"softprompt_fast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["compiler"] = _first_line(_build.compiler(), "--version")
    facts["torch CUDA"] = torch.version.cuda or "none (CPU build)"
    toolkit = _build.cuda_toolkit()
    facts["CUDA toolkit"] = toolkit or "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["GPUs"] = ", ".join(names) or "none"
    facts["cache"] = str(_build.cache_directory())
    facts["threads"] = str(torch.get_num_threads())
    state = _library.state()
    facts["backend"] = state.name
    facts["reason"] = state.reason
    if state.info is not None and state.module is not None:
        facts["extension"] = str(state.module.__file__)
        facts["built with"] = ", ".join(f"{name}: {value}" for name, value in state.info.items())
    return facts


def _first_line(program: str | None, argument: str) -> str:
    if program is None:
        return "none"
    shown = subprocess.run([program, argument], capture_output=True, text=True).stdout.splitlines()
    return f"{program} ({shown[0]})" if shown else program
