"""The first thing to run on a new GPU: every op against its reference, forward and backward, in seconds.

It prints a line per case and exits with 1 if one differs. compute-sanitizer runs it too. `--device cpu` plays the same
through the CPU kernels. Usage::

    PYTHONPATH=tests python tests/ops/cuda/smoke.py --device cuda [--csv smoke.csv]
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.op_cases import Case, assert_same, expected_gradients, gradients, same_bits
from support.segments import table

from softprompt_fast.base.machine import environment
from softprompt_fast.ops.assemble.checks import FLOATS, LAYOUTS
from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.packing import RowTable, pack, reference, unpack

Check = Callable[[], None]
DIMS = (7, 64, 2056)
ROWS, TOKENS = 5, 33


def checks(device: str) -> Iterator[tuple[str, Check]]:
    ops = backend.ops_for(torch.device(device))
    for dtype in FLOATS:
        for layout in LAYOUTS:
            for dim in DIMS:
                case = assemble_case(dtype, layout, dim)
                name = f"{str(dtype).removeprefix('torch.')}, {layout}, D={dim}"
                yield f"assemble, {name}", lambda case=case: assert_forward(case.to(device), ops)  # type: ignore[misc]
                yield f"backward, {name}", lambda case=case: assert_backward(case, device, ops)  # type: ignore[misc]
        yield f"unpack and pack, {dtype}", lambda dtype=dtype: assert_packing(dtype, device)  # type: ignore[misc]


def assemble_case(dtype: torch.dtype, layout: str, dim: int) -> Case:
    """Ragged rows with holes, two prompts and a row without, a token update, and the widest mask."""
    random = torch.Generator().manual_seed(dim)
    ids = torch.randint(50, (ROWS, TOKENS), generator=random)
    mask = torch.rand(ROWS, TOKENS, generator=random) < 0.8
    embedding = torch.randn(50, dim, generator=random).to(dtype)
    prompts = torch.randn(30, dim, generator=random)
    factors = torch.randn(2, 40, 3, generator=random), torch.randn(2, 3, dim, generator=random)
    options = {"layout": layout, "padding_side": "left", "mask_format": "4d_additive", "sliding_window": 20}
    return Case(ids, embedding, prompts, [0, 20, 30], [1, -1, 0, 1, 0], mask, ids, options, factors)


def assert_forward(case: Case, ops: Any) -> None:
    assert_same(case.run(ops), case.run(None))


def assert_backward(case: Case, device: str, ops: Any) -> None:
    case = case.to(device)
    for ours, expected in zip(gradients(case, ops), expected_gradients(case), strict=True):
        assert same_bits(ours.cpu(), expected), f"largest difference {(ours.cpu() - expected).abs().max()}"


def assert_packing(dtype: torch.dtype, device: str) -> None:
    table_here = table([(0, 3), (3, 4), (0, 0), (3, 4)], [20, 3, 41, 0], 7)
    width, slots = 45, 71
    rows, tolerance = RowTable(table_here.to(device), width), 1e-2 if dtype.itemsize == 2 else 1e-6
    packed = torch.randn(slots, 4, 64).to(device, dtype).requires_grad_()
    (padded,) = unpack((packed,), rows)
    assert torch.equal(padded.detach().cpu(), reference.unpack([packed.detach().cpu()], table_here, width, dtype)[0])
    gradient = torch.randn(padded.shape).to(device, dtype)
    (found,) = torch.autograd.grad(padded, packed, gradient)
    for got, given in ((found, gradient), (pack((padded.detach(),), rows, slots)[0], padded.detach())):
        expected = reference.pack([given.cpu()], table_here, slots, dtype)[0]
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if backend.ops_for(device) is None:
        raise SystemExit(f"no native ops for {device}: {backend.state().reason}")
    facts = environment(device, "")
    torch.manual_seed(0)
    rows = []
    for name, check in checks(arguments.device):
        start, outcome = time.perf_counter(), "same"
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            outcome = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        seconds = round(time.perf_counter() - start, 4)
        rows.append({"device": facts["device"], "torch": torch.__version__, "check": name, "outcome": outcome})
        print(f"{name}: {outcome} ({seconds} s)", flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    wrong = sum(row["outcome"] != "same" for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} checks are the same as the reference")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
