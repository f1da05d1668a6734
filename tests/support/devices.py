"""The device of tests that need a GPU. A rehearsal sets it to `cpu` and so runs their code without one."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("SOFTPROMPT_FAST_TEST_DEVICE", "cuda")
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
NEEDS_STREAMS = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has no streams and graphs")
