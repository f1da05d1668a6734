"""The assembly alone: eager PyTorch, the same compiled, ours, and a plain clone as the limit. README.md explains."""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.base.machine import environment
from softprompt_fast.ops.assemble import assemble_reference
from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.extension.contract import AssembleCall, MaskFormat

VOCABULARY = 32_000
SHAPES = [  # large ones first: what a time limit cuts off is the least informative
    (20, 4, 1024, 4096),
    (50, 16, 256, 4096),
    (20, 8, 512, 2048),
    (100, 8, 256, 2048),
    (100, 16, 128, 1024),
    (20, 16, 256, 1024),
    (100, 32, 64, 768),
    (20, 32, 128, 576),
    (20, 16, 32, 576),
    (20, 1, 64, 576),
]
QUICK_SHAPES = [(20, 1, 64, 576), (20, 4, 32, 64)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "step")
PROVIDERS = ("eager", "compile_eager", "compile", "ours", "clone")
HEAD_START = 1_000_000  # cycles, about half a millisecond
Run = Callable[[], object]
Outputs = tuple[Tensor, ...]


def eager(input_ids: Tensor, embedding: Tensor, prompts: Tensor, mask: Tensor, labels: Tensor) -> Outputs:
    """As other libraries write it."""
    rows, length = len(input_ids), len(prompts)
    text = F.embedding(input_ids, embedding)
    repeated = prompts.unsqueeze(0).repeat(rows, 1, 1).to(text.dtype)
    embeds = torch.cat([repeated, text], 1)
    mask = torch.cat([mask.new_ones(rows, length), mask], 1)
    labels = torch.cat([labels.new_full((rows, length), -100), labels], 1)
    positions = (mask.cumsum(-1) - 1).masked_fill_(mask == 0, 0)
    return embeds, mask, positions, labels


@dataclass
class Case:
    """One batch: ragged, right-padded, ids by Zipf's law as in text, so that rows of frequent tokens stay in caches."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        length, rows, tokens, dim = self.shape
        random = torch.Generator().manual_seed(0)
        frequency = 1.0 / (torch.arange(VOCABULARY, dtype=torch.float64) + 2.7)
        ranks = torch.multinomial(frequency, rows * tokens, replacement=True, generator=random)
        # Frequent rows are at random places: neighbours in memory are not neighbours in frequency.
        ids = torch.randperm(VOCABULARY, generator=random)[ranks].view(rows, tokens)
        lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=random)
        lengths[0] = tokens
        mask = (torch.arange(tokens) < lengths).long()
        self.input_ids, self.mask = ids.to(self.device), mask.to(self.device)
        self.labels = torch.where(mask == 1, ids, -100).to(self.device)
        self.embedding = torch.randn(VOCABULARY, dim, generator=random).to(self.device, self.dtype)
        self.prompts = torch.randn(length, dim, generator=random).to(self.device).requires_grad_()
        self.offsets = torch.tensor([0, length])  # on the host, as documented
        self.gradient = torch.randn(rows, length + tokens, dim, generator=random).to(self.device, self.dtype)
        self.device_offsets = self.offsets.to(self.device)
        torch._dynamo.reset()  # so that shapes are static
        self.forwards: dict[str, Callable[[], Outputs]] = {
            "eager": partial(self.eager, eager),
            "compile_eager": partial(self.eager, torch.compile(eager, fullgraph=True, dynamic=False)),
            "twin": partial(self.twin, assemble_reference),
            "compile": partial(self.twin, torch.compile(assemble_reference, fullgraph=True, dynamic=False)),
            "ours": self.ours,
        }

    def eager(self, function: Callable[..., Outputs]) -> Outputs:
        return function(self.input_ids, self.embedding, self.prompts, self.mask, self.labels)

    def twin(self, function: Callable[..., Outputs]) -> Outputs:
        length, rows, tokens, _ = self.shape
        call = AssembleCall(
            self.input_ids,
            self.embedding,
            self.prompts,
            self.device_offsets,
            prompt_ids=None,
            attention_mask=self.mask,
            labels=self.labels,
            plan=None,
            slots=rows * (length + tokens),
            width=length + tokens,
            prompt_segments=0,
            left=False,
            mask_format=MaskFormat.TWO_D.value,
            causal=True,
            window=0,
            scale=1.0,
        )
        return function(call)[:4]

    def ours(self) -> Outputs:
        tensors = (self.input_ids, self.embedding, self.prompts, self.offsets, None, self.mask, self.labels)
        # On a GPU in the form that never waits for it; on a CPU every check is on.
        width = self.shape[0] if self.device.type == "cuda" else None
        batch = spf.assemble(*tensors, max_prompt_length=width)
        assert batch.attention_mask is not None and batch.labels is not None
        return batch.inputs_embeds, batch.attention_mask, batch.position_ids, batch.labels

    def verify(self) -> None:
        """All compute the same: the twin to the bit, eager in every real slot."""
        ours = self.ours()
        for name, a, b in zip(("embeds", "mask", "positions", "labels"), self.forwards["twin"](), ours, strict=True):
            assert torch.equal(a, b), name
        expected = self.forwards["eager"]()
        real = expected[1] == 1
        assert all(torch.equal(a[real], b[real]) for a, b in zip(expected, ours, strict=True))
        gradients = [
            torch.autograd.grad(f()[0], self.prompts, self.gradient)[0] for f in (self.ours, self.forwards["twin"])
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())

    def moved(self, direction: str) -> int:
        """Bytes that must be moved: each output vector read and written once; the gradients that are summed."""
        length, rows, tokens, dim = self.shape
        forward = 2 * rows * (length + tokens) * dim * self.dtype.itemsize
        backward = rows * length * dim * self.dtype.itemsize + length * dim * 4
        return {"forward": forward, "backward": backward, "step": forward + backward}[direction]

    def runs(self, providers: list[str], direction: str) -> dict[str, Run]:
        """The calls to time."""
        runs: dict[str, Run] = {}
        for name in providers:
            if name == "clone":
                runs[name] = self._limit(direction)
            elif direction == "forward":
                runs[name] = torch.no_grad()(self.forwards[name])
            elif direction == "backward":
                embeds = self.forwards[name]()[0]
                runs[name] = partial(torch.autograd.grad, embeds, self.prompts, self.gradient, retain_graph=True)
            else:
                runs[name] = partial(self._step, self.forwards[name])
        return runs

    def _step(self, forward: Callable[[], Outputs]) -> object:
        return torch.autograd.grad(forward()[0], self.prompts, self.gradient)

    def _limit(self, direction: str) -> Run:
        """A clone of the vectors; backward, of the gradients that must be read."""
        whole, part = self.gradient, self.gradient[:, : self.shape[0]]
        if direction == "step":
            return lambda: (whole.clone(), part.clone())
        return whole.clone if direction == "forward" else part.clone


def time_cpu(run: Run, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        result = run()
        times.append((time.perf_counter_ns() - start) / 1000)
        del result
    return times


def time_cuda(run: Run, count: int, flush: Tensor) -> list[float]:
    """Microseconds on the GPU, each call with a cold L2."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)  # the call is queued before the clock starts: the host's time is not the GPU's
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1000 for start, end in events]


def measure(runs: dict[str, Run], device: torch.device, rounds: int, block_ms: float) -> dict[str, list[float]]:
    """Blocks of repetitions per provider, interleaved, each round in another order, so that no provider always follows
    the same other one."""
    clock: Callable[[Run, int], list[float]] = time_cpu
    if device.type == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        clock = partial(time_cuda, flush=flush)
    counts = {}
    for name, run in runs.items():
        clock(run, 3)
        counts[name] = max(3, min(500, int(block_ms * 1000 / statistics.median(clock(run, 3)))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        shift = turn % len(names)
        order = (names[shift:] + names[:shift])[:: 1 if turn % 2 else -1]
        for name in order:
            clock(runs[name], 2)
            times[name] += clock(runs[name], counts[name])
    return times


def rows_of(case: Case, dtype: str, direction: str, times: dict[str, list[float]]) -> Iterator[dict[str, object]]:
    median = {name: statistics.median(values) for name, values in times.items()}

    def ratio(above: str, below: str) -> object:
        return round(median[above] / median[below], 2) if above in median and below in median else ""

    for name, values in times.items():
        p20, *_, p80 = statistics.quantiles(values, n=5)
        yield {
            "device": device_name(case.device),
            "torch": torch.__version__,
            "dtype": dtype,
            **dict(zip("PBTD", case.shape, strict=True)),
            "direction": direction,
            "provider": name,
            "median_us": round(median[name], 1),
            "p20_us": round(p20, 1),
            "p80_us": round(p80, 1),
            "gb_per_s": round(case.moved(direction) / median[name] / 1000, 2),
            "of_clone": ratio(name, "clone"),
            "over_eager": ratio("eager", name),
            "over_compile_eager": ratio("compile_eager", name),
            "over_compile": ratio("compile", name),
        }


def device_name(device: torch.device) -> str:
    name = environment(device, "")["device"]
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="file to write")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions, nothing compiled")
    parser.add_argument("--providers", default=None, help=f"of {','.join(PROVIDERS)}")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--shapes", help="P,B,T,D;P,B,T,D;...")
    parser.add_argument("--rounds", type=int, help="default 8")
    arguments = parser.parse_args()
    default = [name for name in PROVIDERS if not (arguments.quick and "compile" in name)]
    providers = arguments.providers.split(",") if arguments.providers else default
    if unknown := set(providers) - set(PROVIDERS):
        parser.error(f"--providers: unknown {', '.join(sorted(unknown))}")
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.shapes:
        shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shapes.split(";")]
    rounds, block_ms = (2, 1.0) if arguments.quick else (8, 40.0)
    timing = (arguments.rounds or rounds, block_ms)
    device = torch.device(arguments.device)
    torch._functorch.config.donated_buffer = False  # the backward is repeated on one graph
    state = backend.state()
    print(f"{device_name(device)}; torch {torch.__version__}; backend {state.name} ({state.reason})", flush=True)
    with contextlib.ExitStack() as stack:
        write = None
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(arguments.csv.open("w", newline="", buffering=1))  # kept if a run is cut short
            write = csv.writer(file, lineterminator="\n").writerow
        lines = results(shapes, arguments.dtypes.split(","), arguments.directions.split(","), device, providers, timing)
        for number, line in enumerate(lines):
            for values in (line.keys(), line.values())[number > 0 :]:
                show(line, values)
                if write:
                    write(values)


def results(
    shapes: list[tuple[int, int, int, int]],
    dtypes: list[str],
    directions: list[str],
    device: torch.device,
    providers: list[str],
    timing: tuple[int, float],
) -> Iterator[dict[str, object]]:
    for shape in shapes:
        for dtype in dtypes:
            case = Case(shape, DTYPES[dtype], device)
            case.verify()
            for direction in directions:
                yield from rows_of(case, dtype, direction, measure(case.runs(providers, direction), device, *timing))


def show(columns: dict[str, object], values: Iterable[object]) -> None:
    shown = [
        f"{value!s:>{max(len(name), 8)}}"
        for name, value in zip(columns, values, strict=True)
        if name not in ("device", "torch")
    ]
    print("  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
