"""With lengths and numbers of targets on the host, a training step reads nothing from the GPU."""

from __future__ import annotations

from pathlib import Path

from support.own_process import run_apart


def test_on_a_pretended_gpu() -> None:
    run_apart(Path(__file__).with_name("pretended_gpu_cases.py"))
