"""What ``assemble`` gives a GPU to do, counted without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.own_process import run_apart

import softprompt_fast as spf
from softprompt_fast.ops.extension import backend


def test_on_a_pretended_gpu() -> None:
    run_apart(Path(__file__).with_name("launch_cases.py"))


@pytest.mark.parametrize("options", [{}, {"layout": "packed"}, {"mask_format": "4d_bool"}], ids=str)
def test_the_op_only_reserves_memory_beside_its_kernel(native: backend.Ops, options: dict[str, Any]) -> None:
    ids, embedding, prompts = torch.zeros(2, 3, dtype=torch.long), torch.ones(4, 8), torch.ones(5, 8)

    def inside(**more: Any) -> set[str]:
        with torch.autograd.profiler.profile() as profile:
            spf.assemble(ids, embedding, prompts, [0, 2, 5], [1, 0], torch.ones_like(ids), ids, **options, **more)
        (op,) = [event for event in profile.function_events if event.name == "softprompt_fast::assemble"]
        return {event.name for event in op.cpu_children}

    assert inside(check=False) == {"aten::empty"}
    assert inside(check=True) == {"aten::empty", "aten::full"}
