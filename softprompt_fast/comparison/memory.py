"""Peak memory during a part of a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """The process's largest resident size since ``reset``; on a GPU, the most memory allocated there.

    Resident size includes the interpreter, its libraries and the model. Only Linux can reset a peak. Elsewhere
    ``resettable`` is False and the peak is that of the whole process.
    """

    def __init__(self, device: Any) -> None:
        self.device = torch.device(device)
        self.resettable = True

    def reset(self) -> int:
        """Resets the peak; returns the memory in use now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed after loading would count
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.resettable = False
        return _status("VmRSS") or self.peak()

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _status("VmHWM")
        if peak is not None:
            return peak
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    """A size from /proc/self/status, in bytes; None: not known here."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
