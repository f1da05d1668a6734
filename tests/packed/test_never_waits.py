"""With lengths and numbers of targets on the host, a training step reads nothing from the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("pretended_gpu_cases.py")


def test_on_a_pretended_gpu() -> None:
    """In another process, because a device that is registered stays in this one."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
