"""Versions of packages and facts about the hardware."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "scipy", "numpy")


def environment(device: Any, backend: str) -> dict[str, Any]:
    """Versions and hardware."""
    import torch

    from .version import __version__

    versions = {"softprompt_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "versions": versions,
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backend": backend,
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
