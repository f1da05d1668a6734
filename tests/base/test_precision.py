"""The precision of float32 products: read for each device, and set for a while."""

from __future__ import annotations

from threading import Event, Thread

import pytest
import torch
from support.rounded_products import precision_restored  # noqa: F401

from softprompt_fast.base.precision import float32_precision, float32_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.usefixtures("precision_restored")


@pytest.mark.parametrize(
    ("setting", "cpu", "cuda"),
    [("highest", "ieee", "ieee"), ("high", "tf32", "tf32"), ("medium", "bf16", "tf32"), (None, "ieee", "ieee")],
)
def test_a_precision_holds_for_a_while(setting: str | None, cpu: str, cuda: str) -> None:
    with pytest.raises(KeyError), float32_products(setting):
        assert (float32_precision(CPU), float32_precision(CUDA)) == (cpu, cuda)
        raise KeyError
    assert (float32_precision(CPU), float32_precision(CUDA)) == ("ieee", "ieee")
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_the_user_set_comes_back() -> None:
    torch.set_float32_matmul_precision("high")
    with float32_products("highest"):
        assert float32_precision(CPU) == "ieee"
    assert torch.get_float32_matmul_precision() == "high" and float32_precision(CUDA) == "tf32"


def test_a_backend_of_its_own_comes_back() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with float32_products("highest"):
        assert float32_precision(CPU) == "ieee"
    assert (float32_precision(CPU), float32_precision(CUDA)) == ("bf16", "ieee")


def test_a_parent_keeps_its_effect() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with float32_products("medium"):
            assert float32_precision(CPU) == "bf16"
        assert (float32_precision(CPU), float32_precision(CUDA)) == ("tf32", "tf32")
        torch.backends.fp32_precision = "ieee"
        assert (float32_precision(CPU), float32_precision(CUDA)) == ("ieee", "ieee")
    finally:
        torch.backends.fp32_precision = before


def test_a_common_precision_beside_a_backend_of_its_own_comes_back() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with float32_products("highest"):
        assert float32_precision(CUDA) == "ieee"
    assert torch.backends.cuda.matmul.allow_tf32 and float32_precision(CPU) == "bf16"


def test_nested_uses_and_threads_that_overlap() -> None:
    torch.set_float32_matmul_precision("high")
    with float32_products("medium"):
        with float32_products("highest"):
            assert float32_precision(CPU) == "ieee"
        assert float32_precision(CPU) == "bf16"
    entered, leave = Event(), Event()

    def other() -> None:
        with float32_products("medium"):
            entered.set()
            assert leave.wait(30)

    thread = Thread(target=other)
    with float32_products("highest"):
        thread.start()
        assert entered.wait(30)
        assert float32_precision(CPU) == "bf16"
    assert float32_precision(CPU) == "bf16"
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"


def test_other_devices_do_not_round() -> None:
    torch.set_float32_matmul_precision("medium")
    assert float32_precision(torch.device("meta")) == "ieee"
