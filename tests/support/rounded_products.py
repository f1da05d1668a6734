"""A fixture for tests that change the precision of float32 products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

BACKENDS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


@pytest.fixture
def precision_restored() -> Iterator[None]:
    before = [backend.fp32_precision for backend in BACKENDS]
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision
