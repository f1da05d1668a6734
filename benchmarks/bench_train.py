"""One training step (forward and backward) of prompt tuning: PEFT, the padded path and shared-prompt execution.

All run the same ragged batches (rows of T/2 to T tokens, padded on the right), interleaved in one process, and their
medians are compared. Losses and prompt gradients are compared with the padded path's. Peak memory above the model is
measured too: on a CPU in a separate process for each, on a GPU during the first steps, by its allocator. Usage::

    python benchmarks/bench_train.py --model DIR [--dtype bfloat16] [--output benchmarks/results/train_cpu.csv]
    python benchmarks/bench_train.py --model llama-1b --dtype bfloat16 --device cuda --shapes "100,32,64;20,32,128"
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    add_model_arguments,
    append_rows,
    argument_parser,
    environment,
    interleaved,
    last_line,
    load,
    print_profile,
    synchronise,
)
from torch import Tensor

import softprompt_fast as spf

SHAPES = ((20, 16, 32), (100, 16, 32), (20, 16, 128), (100, 8, 64))
PROVIDERS = ("peft", "padded", "shared")
UNGRAPHED = "shared_without_graphs"
"""Shared-prompt execution without CUDA graphs; only on a GPU."""
COMPILED = "peft_compiled"
"""PEFT with the base model under ``torch.compile``; only with --compile, because compiling takes long."""
WARM_UP = 4
"""Steps before the measurement on a GPU: then the batch runs as a CUDA graph."""


def batch(rows: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels; the target of each row is its last token, as in classification."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows,), generator=generator)
    mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    last = (lengths - 1)[:, None]
    labels = torch.full_like(ids, -100).scatter_(1, last, ids.gather(1, last))
    return ids, mask, labels


def step(provider: str, model: Any, virtual: int, rows: int, tokens: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that runs one step and returns the loss and the prompt's gradient."""
    ids, mask, labels = (x.to(model.device) for x in batch(rows, tokens, model.config.vocab_size))
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(virtual, model.get_input_embeddings().weight.shape[1], generator=generator) * 0.1
    if provider in ("peft", COMPILED):
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        tuned: Any = peft.get_peft_model(model, config)
        if provider == COMPILED:
            model.forward = torch.compile(model.forward, dynamic=False)
        parameter = tuned.prompt_encoder["default"].embedding.weight
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    else:
        execution = "padded" if provider == "padded" else "shared"
        tuned = spf.SoftPromptModel(model, execution=execution, cuda_graphs=provider == "shared")
        parameter = tuned.add_prompt("p", init=prompt)
        arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        parameter.copy_(prompt)

    def run() -> tuple[Tensor, Tensor]:
        parameter.grad = None
        loss = tuned(**arguments).loss
        loss.backward()
        assert parameter.grad is not None
        return loss.detach(), parameter.grad

    return run


def useful_flops(model: Any, virtual: int, rows: int, tokens: int) -> float:
    """Matrix products of one step on useful tokens: each prompt once, real tokens, logits that are read.

    Two floating-point operations per weight and token forward, and as many backward (weights are frozen).
    """
    _, mask, _ = batch(rows, tokens, model.config.vocab_size)
    inside = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    head = model.get_input_embeddings().weight.numel()
    return 4.0 * (inside * (virtual + int(mask.sum())) + head * rows)


def matrix_speed(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a matrix product: of the model's size on a CPU, of one that fills it on a GPU."""
    rows, width = (1024, 1536) if device == "cpu" else (8192, 8192)
    a, b = torch.randn(rows, width, dtype=dtype, device=device), torch.randn(width, width, dtype=dtype, device=device)
    times = []
    for _ in range(20):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * width / statistics.median(times[5:]) / 1e9


def resident_memory(arguments: argparse.Namespace, provider: str, shape: tuple[int, int, int]) -> float:
    """Largest size in memory above the loaded model during a step on the CPU, in MB; in a separate process."""
    options = ["--model", arguments.model, "--dtype", arguments.dtype]
    options += ["--memory", provider, "--shape", ",".join(map(str, shape))]
    return float(last_line(__file__, *options, quiet=True))


def start_memory(device: str) -> int:
    """Bytes in use on a GPU now; the largest number is counted anew."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure_memory(arguments: argparse.Namespace) -> None:
    model = load(arguments.model, arguments.dtype)
    for parameter in model.parameters():  # every page of the model counts as loaded
        parameter.abs().max()
    run = step(arguments.memory, model, *map(int, arguments.shape.split(",")))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, loading the model, does not count
    run()
    run()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """A size of this process in MB, as Linux gives it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def measure(arguments: argparse.Namespace, model: Any, shape: tuple[int, int, int]) -> Row:
    """One row of the results."""
    device = arguments.device
    providers = [*PROVIDERS]
    providers += [] if device == "cpu" else [UNGRAPHED]
    providers += [COMPILED] if arguments.compile else []
    steps, first, memory = {}, {}, {}
    for provider in providers:
        steps[provider] = step(provider, load(arguments.model, arguments.dtype, device), *shape)
        before = start_memory(device)
        for _ in range(WARM_UP if device != "cpu" else 1):
            loss, gradient = steps[provider]()
        if device != "cpu":  # a graph keeps its memory, so later steps allocate little
            memory[provider] = (torch.cuda.max_memory_allocated() - before) / 1e6
        elif not arguments.no_memory and provider in PROVIDERS:
            memory[provider] = resident_memory(arguments, provider, shape)
        first[provider] = loss.item(), gradient.float().clone()
    dtype = getattr(torch, arguments.dtype)
    speeds = [matrix_speed(dtype, device)]
    medians = interleaved(steps, arguments.rounds, lambda: speeds.append(matrix_speed(dtype, device)), device)
    limit = statistics.median(speeds)
    achieved = useful_flops(model, *shape) / medians["shared"] / 1e9
    padded_loss, padded = first["padded"]
    if arguments.profile:
        for provider in providers:
            print_profile(provider, steps[provider], device)

    def error(provider: str) -> str:
        gradient = first[provider][1]
        return f"{((gradient - padded).norm() / padded.norm()).item():.1e}"

    return {
        **environment(device),
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "P,B,T": " ".join(map(str, shape)),
        **{f"{p}_s": round(medians[p], 4) for p in providers},
        "shared_over_peft": round(medians["peft"] / medians["shared"], 2),
        "padded_over_peft": round(medians["peft"] / medians["padded"], 2),
        "gflops": round(achieved),
        "limit_gflops": round(limit),
        "share_of_limit": round(achieved / limit, 2),
        "gradient_error": error("shared"),
        "peft_gradient_error": error("peft"),
        "loss_error": f"{abs(first['shared'][0] - padded_loss):.1e}",
        **{f"{p}_mb": round(value) for p, value in memory.items()},
    }


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="float32", rounds=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, after the measurement")
    parser.add_argument("--compile", action="store_true", help="measure PEFT under torch.compile too")
    parser.add_argument("--shape", "--shapes", help='"P,B,T;P,B,T"; default: the four of the README')
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments)
        return
    shapes = SHAPES
    if arguments.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shape.split(";")]
    model = load(arguments.model, arguments.dtype, arguments.device)
    for shape in shapes:
        row = measure(arguments, model, shape)
        print(json.dumps(row), flush=True)
        if arguments.output:
            append_rows(arguments.output, [row])  # at once: a run may be cut short


if __name__ == "__main__":
    main()
