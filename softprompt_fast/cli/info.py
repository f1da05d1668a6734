"""``info``: the versions, the hardware and the backend of this installation, as bug reports need them."""

from __future__ import annotations

import platform
import subprocess

from ..base.machine import gpu_names, package_versions

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "ninja", "pybind11", "safetensors")
TYPICAL_SIZES = (576, 1536)
"""Hidden and intermediate size that are measured if no model has been loaded on this machine: SmolLM2-135M's."""


def info() -> None:
    """Shows versions, compiler, CUDA, cache, and which backend is active and why."""
    for name, value in report().items():
        print(f"{name:<18} {value}")


def report() -> dict[str, str]:
    """Names and values in the order in which they are printed. Chooses the backend, which may compile it."""
    import torch

    from ..base.version import __version__
    from ..ops.extension import backend, build

    facts = {"softprompt_fast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= package_versions(PACKAGES)
    facts["compiler"] = _first_line(build.compiler(), "--version")
    facts["torch CUDA"] = torch.version.cuda or "none (CPU build)"
    facts["CUDA toolkit"] = build.cuda_toolkit() or "none"
    facts["GPUs"] = ", ".join(gpu_names()) or "none"
    facts["cache"] = str(build.cache_directory())
    facts["threads"] = str(torch.get_num_threads())
    state = backend.state()
    facts["backend"] = state.name
    facts["reason"] = state.reason
    if state.info is not None and state.module is not None:
        facts["extension"] = str(state.module.__file__)
        facts["built with"] = ", ".join(f"{name}: {value}" for name, value in state.info.items())
    return facts | _dtypes()


def _dtypes() -> dict[str, str]:
    """The dtype that "auto" means on this CPU, for each size of model that was measured."""
    from ..hf.dtype import layer_speed, remembered

    measured = remembered() or {TYPICAL_SIZES: layer_speed(*TYPICAL_SIZES)}
    return {f"auto {hidden}x{intermediate}": speed.describe() for (hidden, intermediate), speed in measured.items()}


def _first_line(program: str | None, argument: str) -> str:
    if program is None:
        return "none"
    shown = subprocess.run([program, argument], capture_output=True, text=True).stdout.splitlines()
    return f"{program} ({shown[0]})" if shown else program
