"""unpack and pack: native and CUDA thread code against the twin, each the other's adjoint."""

from __future__ import annotations

import pytest
import torch
from support.devices import DEVICE, ON_GPU
from support.segments import table

from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.packing import RowTable, pack, reference, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = sorted({(a, b) for d in DTYPES for a, b in ((d, d), (d, torch.float32), (torch.float32, d))}, key=str)


CASES = {
    "one prefix": (table([(0, 3)] * 3, [2, 5, 1], 3), 8, 11),
    "two prefixes, a row without": (table([(0, 3), (3, 4), (0, 0), (3, 4)], [2, 3, 4, 0], 7), 8, 16),
    "no prefix": (table([(0, 0)] * 2, [4, 2], 0), 4, 6),
    "slots that no row holds": (table([(2, 2)], [3], 6), 6, 12),
    "no rows": (table([], [], 0), 4, 5),
    "many rows of one prefix": (table([(0, 2)] * 20, [1] * 20, 2), 3, 22),
}


@pytest.fixture(params=["native", "emulated", pytest.param("gpu", marks=ON_GPU)])
def place(request: pytest.FixtureRequest, native: backend.Ops) -> tuple[backend.Ops, str]:
    """The ops to test and the device of their tensors."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated"), "cpu"
    return native, DEVICE if request.param == "gpu" else "cpu"


@pytest.mark.parametrize("size", [(2, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equal_the_twin(
    place: tuple[backend.Ops, str],
    case: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    size: tuple[int, int],
) -> None:
    ops, device = place
    dtype, out = dtypes
    rows, width, slots = CASES[case]
    rows_there = rows.to(device)
    heads, length = size
    key = torch.randn(slots, heads, length).to(device, dtype)
    value = torch.randn(heads, slots, 2 * length).to(device, dtype).transpose(0, 1)[..., ::2]  # odd alignment
    for got, expected in zip(
        ops.unpack([key, value], rows_there, width, out),
        reference.unpack([key.cpu(), value.cpu()], rows, width, out),
        strict=True,
    ):
        assert got.dtype == out and torch.equal(got.cpu(), expected)
    grads = [torch.randn(len(rows), heads, width, length).to(device, dtype).transpose(1, 2) for _ in range(2)]
    for got, expected in zip(
        ops.pack(grads, *RowTable(rows_there, width).holders(slots), out),
        reference.pack([grad.cpu() for grad in grads], rows, slots, out),
        strict=True,
    ):
        assert got.dtype == out
        tolerance = 1e-2 if out.itemsize == 2 else 1e-6
        assert torch.allclose(got.cpu().double(), expected.double(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    rows, width, slots = CASES[case]
    key = torch.randn(slots, 2, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(slots, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *packed: tuple(unpack(packed, RowTable(rows, width))), (key, value))
    padded = torch.randn(len(rows), width, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: pack((x,), RowTable(rows, width), slots), (padded,))


def test_the_same_bits_for_any_number_of_threads(native: backend.Ops) -> None:
    rows = table([(0, 50)] * 40, [7] * 40, 50)
    grad, held = torch.randn(40, 57, 4, 64), RowTable(rows, 57).holders(330)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.pack([grad], *held, torch.float32)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck(native: backend.Ops) -> None:
    rows, width, slots = CASES["two prefixes, a row without"]
    key = torch.randn(slots, 2, 8)
    torch.library.opcheck(torch.ops.softprompt_fast.unpack.default, ([key, key], rows, width, torch.float32))
    padded = torch.randn(len(rows), width, 2, 8)
    torch.library.opcheck(
        torch.ops.softprompt_fast.pack.default, ([padded], *RowTable(rows, width).holders(slots), torch.float32)
    )
    assert native.unpack is torch.ops.softprompt_fast.unpack.default


def test_slots_outside_the_tensor_are_never_read(native: backend.Ops) -> None:
    (result,) = native.unpack([torch.ones(4, 1, 2)], torch.tensor([[2, 9, -3, 2]]), 11, torch.float32)
    assert result.sum() == 2 * 2  # slots 2 and 3; the prefix and the rest are outside
