"""The faster dtype of a model on this CPU, by measurement: flags do not say how fast bfloat16 is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock

from ..base.files import read_json, write_json
from ..base.machine import available_memory, cpu_flags, cpu_name
from ..ops.extension.build import cache_directory

SECONDS = 0.2
"""Time for a measurement."""
PAIR_SECONDS = 0.04
"""Time for a run of each dtype. It limits the tokens, so that the slower dtype does not take all the time."""
PROBE_TOKENS, MOST_TOKENS = 8, 128
LEAST_RUNS = 2
LARGEST_HIDDEN = 768
"""A wider model is measured at this width: its ratio is the same, and its weights would take too long to write."""
MEMORY_MARGIN = 1.25
"""Memory that a model needs, relative to its weights."""


@dataclass(frozen=True)
class LayerSpeed:
    """Billions of floating-point operations per second of a frozen layer on one core, forward and backward."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> torch.dtype:
        return torch.bfloat16 if self.bfloat16 > self.float32 else torch.float32

    def describe(self) -> str:
        """Such as "bfloat16: 340 against 140 GFLOP/s per core in float32, measured on this machine"."""
        best, other = ("bfloat16", "float32") if self.faster == torch.bfloat16 else ("float32", "bfloat16")
        return (
            f"{best}: {getattr(self, best):.0f} against {getattr(self, other):.0f} GFLOP/s per core in {other}, "
            "measured on this machine"
        )


@dataclass(frozen=True)
class DtypeChoice:
    dtype: torch.dtype
    reason: str
    """A line for the user, which begins with the dtype's name."""


def choose_dtype(config: Any, parameters: int = 0) -> DtypeChoice:
    """The dtype for a model on the CPU: the faster one, unless memory fits only bfloat16.

    Args:
        config: of transformers; its hidden and intermediate sizes are those of the measured layer.
        parameters: number of the model's weights. 0: memory is not looked at.
    """
    free = available_memory()
    if free is not None and 2 * parameters * MEMORY_MARGIN <= free < 4 * parameters * MEMORY_MARGIN:
        return DtypeChoice(
            torch.bfloat16,
            f"bfloat16: {4 * parameters / 1e9:.1f} GB of weights in float32 do not fit the free {free / 1e9:.1f} GB",
        )
    speed = layer_speed(*layer_sizes(config))
    return DtypeChoice(speed.faster, speed.describe())


def layer_sizes(config: Any) -> tuple[int, int]:
    """Hidden and intermediate size; the latter is 4 times the former where the configuration does not name it."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    names = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size")
    known = (getattr(text, name, None) for name in names)
    return hidden, next((int(size) for size in known if isinstance(size, int)), 4 * hidden)


def layer_speed(hidden: int, intermediate: int) -> LayerSpeed:
    """The speeds of a layer of these sizes: from the cache, or measured and remembered there.

    Of processes that start together, one measures and the others wait for it.
    """
    facts = _machine() | {"hidden": hidden, "intermediate": intermediate}
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    file = _folder() / f"{digest}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            speed = _stored(read_json(file))
            if speed is None:
                speed = measure(hidden, intermediate)
                write_json(file, facts | asdict(speed))
            return speed
    except OSError:  # the cache cannot be written
        return measure(hidden, intermediate)


def remembered() -> dict[tuple[int, int], LayerSpeed]:
    """What was measured on this machine with this version of torch, by hidden and intermediate size."""
    known, machine = {}, _machine()
    for file in sorted(_folder().glob("*.json")):
        facts = read_json(file) or {}
        speed = _stored(facts)
        if speed is not None and machine.items() <= facts.items():
            known[facts["hidden"], facts["intermediate"]] = speed
    return dict(sorted(known.items()))


def _folder() -> Path:
    return cache_directory() / "dtype"


def _machine() -> dict[str, Any]:
    """What the speeds depend on, apart from sizes."""
    flags = hashlib.sha256(cpu_flags().encode()).hexdigest()[:16]
    return {"cpu": cpu_name(), "flags": flags, "torch": torch.__version__}


def _stored(facts: dict[str, Any] | None) -> LayerSpeed | None:
    try:
        return LayerSpeed(**{name: float((facts or {})[name]) for name in ("float32", "bfloat16")})
    except (KeyError, TypeError, ValueError):  # not a file of this version
        return None


def measure(hidden: int, intermediate: int) -> LayerSpeed:
    """Runs a layer in both dtypes in turn, for about 0.2 s, and takes the best time of each.

    It runs on one core and measures this thread's processor time, so that other processes disturb it little. With
    several threads, the time would include waiting for threads that other processes have interrupted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure_on_one_core(hidden, intermediate)
    finally:
        torch.set_num_threads(threads)


def _measure_on_one_core(hidden: int, intermediate: int) -> LayerSpeed:
    frozen_layer(16, 16, torch.float32)(1)  # the first gradient of a process loads parts of torch
    end = time.perf_counter() + SECONDS
    if hidden > LARGEST_HIDDEN:
        hidden, intermediate = LARGEST_HIDDEN, max(1, intermediate * LARGEST_HIDDEN // hidden)
    layers = [frozen_layer(hidden, intermediate, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for layer in layers:
        layer(PROBE_TOKENS)  # the first run of a size prepares the kernels
    probe = sum(_seconds(layer, PROBE_TOKENS) for layer in layers)
    tokens = max(PROBE_TOKENS, min(MOST_TOKENS, int(PROBE_TOKENS * PAIR_SECONDS / max(probe, 1e-6))))
    if tokens > PROBE_TOKENS:
        for layer in layers:
            layer(tokens)
    best = [float("inf")] * len(layers)
    for run in count(1):
        start = time.perf_counter()
        best = [min(seconds, _seconds(layer, tokens)) for seconds, layer in zip(best, layers, strict=True)]
        if run >= LEAST_RUNS and 2 * time.perf_counter() - start > end:  # another pair would take too long
            break
    operations = 4 * tokens * hidden * (2 * hidden + 3 * intermediate)
    return LayerSpeed(*(round(operations / max(seconds, 1e-9) / 1e9, 1) for seconds in best))


def frozen_layer(hidden: int, intermediate: int, dtype: torch.dtype) -> Callable[[int], None]:
    """Forward and backward of a decoder layer without attention, as in tuning: no gradient of the weights.

    Matrix products alone mislead: norms, activations and residuals gain less from bfloat16.
    """

    def weight(rows: int, columns: int) -> torch.Tensor:
        scale = columns**-0.5
        return torch.linspace(-scale, scale, rows * columns).view(rows, columns).to(dtype)

    query, output = weight(hidden, hidden), weight(hidden, hidden)
    gate, up, down = weight(intermediate, hidden), weight(intermediate, hidden), weight(hidden, intermediate)

    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def run(tokens: int) -> None:
        with torch.enable_grad():
            x = weight(tokens, hidden).requires_grad_()
            attended = x + F.linear(F.linear(norm(x), query), output)
            normed = norm(attended)
            y = attended + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
            torch.autograd.grad(y, x, torch.ones_like(y))

    return run


def _seconds(layer: Callable[[int], None], tokens: int) -> float:
    start = time.thread_time()
    layer(tokens)
    return time.thread_time() - start
