"""What every test starts from: the same seeds, and a native backend that is known to be built."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from softprompt_fast import _build, _library

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def backend() -> str:
    """Name of the backend. With a compiler it must be the native one: a build that fails is an error, not a skip."""
    if _build.compiler() is not None and os.environ.get("SOFTPROMPT_FAST_BACKEND", "auto") == "auto":
        _build.ensure(retry=True)
        assert _library.state().name == "native", _library.state().reason
    return _library.state().name


@pytest.fixture(scope="session")
def native(backend: str) -> _library.Ops:
    """The native ops, for tests that compare them with their twin."""
    if backend != "native":
        pytest.skip(f"native ops: {_library.state().reason}")
    assert _library._ops is not None
    return _library._ops
