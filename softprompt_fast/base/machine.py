"""Versions of packages and facts about the hardware."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

CONTAINER_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""The limit of a container's memory, what is used of it, and what of that is file cache: cgroups v2 and v1."""
PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "scipy", "numpy")


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, or "not installed"."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def environment(device: Any, backend: str) -> dict[str, Any]:
    """Versions and hardware that a measurement depends on."""
    import torch

    from .version import __version__

    versions = {"softprompt_fast": __version__, "python": platform.python_version()}
    return {
        "versions": versions | package_versions(PACKAGES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backend": backend,
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    return _cpu_fact("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Such as "GenuineIntel" and "AuthenticAMD"; an empty text where the operating system does not say."""
    vendor = _cpu_fact("vendor_id")
    return vendor or next((name for name in ("GenuineIntel", "AuthenticAMD") if name in platform.processor()), "")


def cpu_flags() -> str:
    """The instruction sets of this CPU as Linux names them; elsewhere an empty text."""
    return _cpu_fact("flags") or _cpu_fact("Features")  # Arm


def _cpu_fact(name: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == name:
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def available_memory() -> int | None:
    """Bytes that this process can still use, within its container's limit; None: unknown."""
    known = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit, used, file in CONTAINER_MEMORY:
        with suppress(OSError, StopIteration, ValueError, IndexError):  # no limit is written as "max"
            lines = Path(file).read_text().splitlines()
            cache = int(
                next(line for line in lines if line.startswith(("inactive_file", "total_inactive_file"))).split()[1]
            )
            known.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + cache)
    return max(0, min(known)) if known else None


def gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
