"""How much the CUDA kernels do, counted in branches while a CPU plays them: no more than they have to sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.segments import table

from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.packing import RowTable

SMALL, LARGE = 32, 256
# Growth by this factor is linear but for a search in a sorted table; rows times slots would grow by its square.
LINEAR = 1.5 * LARGE / SMALL


def steps_of(call: Callable[[], Any]) -> int:
    before = torch.ops.softprompt_fast_emulated.steps()
    call()
    return torch.ops.softprompt_fast_emulated.steps() - before


def growth(call_for: Callable[[int], Callable[[], Any]]) -> float:
    return steps_of(call_for(LARGE)) / steps_of(call_for(SMALL))


def test_branches_are_counted(emulated: backend.Ops) -> None:
    def call_for(count: int) -> Callable[[], Any]:
        places, starts = RowTable(table([(0, 1)] * count, [0] * count, 1), 1).holders(1)
        return lambda: emulated.pack([torch.ones(count, 1, 1, 1)], places, starts, torch.float32)

    assert growth(call_for) > 2  # one slot that all rows hold


def test_pack_looks_at_what_a_slot_holds_only(emulated: backend.Ops) -> None:
    def call_for(rows: int) -> Callable[[], Any]:
        prefixes = [(2 * (row // 4), 2) for row in range(rows)]  # four rows share a prefix
        slots = rows // 2 + rows
        places, starts = RowTable(table(prefixes, [1] * rows, rows // 2), 3).holders(slots)
        return lambda: emulated.pack([torch.ones(rows, 3, 1, 1)], places, starts, torch.float32)

    assert growth(call_for) < LINEAR


def test_the_gradient_of_prompts_looks_at_their_own_uses_only(emulated: backend.Ops) -> None:
    def call_for(prompts: int) -> Callable[[], Any]:
        grad, slots = torch.ones(4 * prompts, 4), torch.arange(0, 4 * prompts, 2)  # each of two vectors, used twice
        ids, offsets = torch.arange(2 * prompts) % prompts, torch.arange(0, 2 * prompts + 1, 2)
        return lambda: emulated.prompt_backward(grad, slots, ids, offsets, 2 * prompts, torch.float32)

    assert growth(call_for) < LINEAR
