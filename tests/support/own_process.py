"""Files of tests that change their process for good run in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_apart(cases: Path) -> None:
    """Runs a file of tests in a process of its own; one of them must pass and none may fail."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
