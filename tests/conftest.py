"""Every test starts with the same seeds and with a native backend that is built."""

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from support.hub_stand_in import hub  # noqa: F401

from softprompt_fast.ops.extension import backend, build

NAMESPACE = "softprompt_fast_emulated"
SOURCE = Path(__file__).parent / "csrc" / "cuda_on_cpu.cpp"
# A GPU faults at a misaligned access; so do these, and at an index outside an array.
SANITIZE = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
COUNT = "-fsanitize-coverage=trace-pc"

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
def backend_name() -> str:
    """The backend. With a compiler it must be the native one: a failed build is an error, not a skip."""
    if build.compiler() is not None and os.environ.get("SOFTPROMPT_FAST_BACKEND", "auto") == "auto":
        build.ensure(retry=True)
        assert backend.state().name == "native", backend.state().reason
    return backend.state().name


@pytest.fixture(scope="session")
def native(backend_name: str) -> backend.Ops:
    """The native ops, for tests that compare them with their twin."""
    if backend_name != "native":
        pytest.skip(f"native ops: {backend.state().reason}")
    ops = backend.native_ops()
    assert ops is not None
    return ops


@pytest.fixture(scope="session")
def emulated() -> backend.Ops:
    """The CUDA kernels' thread code, played on a CPU."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    plan = build.plan(cuda=False, extra_sources=(SOURCE,), namespace=NAMESPACE)
    plan = replace(plan, cflags=(*plan.cflags, *SANITIZE, COUNT), key=f"{plan.key}-counted")
    torch.ops.load_library(build.ensure(plan, retry=True))
    return backend.bind(NAMESPACE)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer on disk."""
    from support.tiny_models import build
    from support.tiny_reviews import tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
