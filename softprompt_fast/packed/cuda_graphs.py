"""Packed batches on a GPU, replayed as CUDA graphs: one launch takes the place of thousands.

On a fast GPU a step of a small model takes as long as the launches of its kernels. A graph has fixed sizes, so a batch
is padded to :class:`Sizes` that many batches have in common. Padding slots form segments of their own, which no other
segment reads; they are at most 1/16 of a batch, and fewer than 8 of a small one. A batch whose sizes are new runs as
usual.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base.errors import Unsupported
from ..hf.cuda_graphs import (
    MORE_OUTPUT,
    MOST_GRAPHS,
    ModelGraphs,
    most_memory,
    on_gpu,
    python_interferes,
    side_stream,
)
from ..ops.extension import backend
from ..ops.segment_attention.ragged import Line, RaggedPlan, host_plan
from .batch import PackedInputs
from .layout import PackedLayout, RowGroup
from .self_check import tolerance

if TYPE_CHECKING:
    from typing import TypeAlias

    from .runner import PackedRunner
    from .task_heads import Decoder

    Runner: TypeAlias = "PackedRunner | Decoder"

logger = logging.getLogger("softprompt_fast")
GRAIN = 16
"""Sizes are rounded up to 1/16 of their largest power of two."""
LEAST_STEP = 8
EAGER_BATCHES = 2
"""Batches of a size that run as usual before the next is captured, which takes about four steps."""


@dataclass(frozen=True)
class Sizes:
    """What the batches of one graph have in common."""

    slots: int
    keys: int
    segments: int
    answers: int
    """Slots whose logits are computed."""
    longest_segment: int
    longest_keys: int
    gradient: bool

    @classmethod
    def of(cls, lines: Sequence[Line], answers: int, gradient: bool) -> Sizes:
        own = sum(length for _, length, *_ in lines)
        longest = _power_of_two(max(length for _, length, *_ in lines))
        slots = _rounded(own)
        return cls(
            slots=slots,
            keys=_rounded(slots + sum(prefix for *_, prefix in lines)),
            # The padding of slots may take this many segments.
            segments=_rounded(len(lines) + 1 + max(LEAST_STEP, slots // GRAIN) // longest),
            answers=_rounded(answers),
            longest_segment=longest,
            longest_keys=_power_of_two(max(length + prefix for _, length, _, prefix in lines)),
            gradient=gradient,
        )

    def padded(self, lines: Sequence[Line]) -> list[Line]:
        """The segments, followed by those of the padding and by empty ones."""
        at = sum(length for _, length, *_ in lines)
        added: list[Line] = []
        while at < self.slots:
            length = min(self.longest_segment, self.slots - at)
            added.append((at, length, 0, 0))
            at += length
        empty: list[Line] = [(self.slots, 0, 0, 0)] * (self.segments - len(lines) - len(added))
        return [*lines, *added, *empty]

    @property
    def parts(self) -> list[int]:
        """Lengths of the tensors of a :class:`RaggedPlan`."""
        return [self.segments + 1, self.segments + 1, self.keys, self.keys, self.slots + 1]


def _rounded(number: int) -> int:
    step = max(LEAST_STEP, (1 << max(0, number.bit_length() - 1)) // GRAIN)
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


class _FixedLayout(PackedLayout):
    """A layout whose plan lies in tensors that every replay fills anew."""

    def __init__(self, plan: RaggedPlan, slots: int, attention: Any) -> None:
        self._plan, self._slots, self.attention, self.windows = plan, slots, attention, set()

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def ragged(self) -> RaggedPlan:  # type: ignore[override]
        return self._plan

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        raise Unsupported("its attention needs a mask for each batch")


class _Ticket:
    """One forward pass of a graph whose backward pass may follow."""

    used = False


class StepGraph:
    """The forward pass, and with `gradient` the backward pass, of batches of the same :class:`Sizes`."""

    def __init__(self, runner: Runner, sizes: Sizes, like: Tensor) -> None:
        """`like` [1, K, D] has the dtype and device of the vectors."""
        self.sizes = sizes
        self.embeds = torch.zeros(1, sizes.slots, like.shape[2], dtype=like.dtype, device=like.device)
        self.positions, self.read, self.plan = (
            torch.zeros(shape, dtype=torch.int64, device=like.device)
            for shape in ((1, sizes.slots), (sizes.answers,), (sum(sizes.parts),))
        )
        self.logits: Tensor
        self.logits_gradient: Tensor
        self.gradient: Tensor
        self.output_type: type[Any]
        self._forward: Any = None
        self._backward: Any = None
        self._runner = weakref.ref(runner)

    @property
    def nbytes(self) -> int:
        """Without what lies between the passes."""
        passed = [self.embeds, self.logits, *([self.logits_gradient, self.gradient] if self.sizes.gradient else [])]
        return sum(tensor.nbytes for tensor in passed)

    def capture(self, pool: Any, stream: Any) -> None:
        """Records the passes; what they need in between is in `pool`."""
        # Other threads, such as a loader's that pins memory, go on meanwhile.
        options: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with side_stream(stream):
            with torch.cuda.stream(stream):  # a first run lets libraries allocate what they work in
                leaf, logits = self.forward_pass()
                if self.sizes.gradient:
                    self.backward_pass(leaf, logits, torch.zeros_like(logits))
            del leaf, logits
            self._forward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._forward, **options):
                leaf, logits = self.forward_pass()
            if self.sizes.gradient:
                self.logits_gradient = torch.zeros_like(logits)
                self._backward = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._backward, **options):
                    self.gradient = self.backward_pass(leaf, logits, self.logits_gradient)
        # Without its autograd graph: the memory between the passes serves other graphs of the pool too.
        self.logits = logits.detach()

    def forward_pass(self) -> tuple[Tensor, Tensor]:
        """The vectors, as a leaf, and the logits of a batch as this graph holds it."""
        runner = self._runner()
        assert runner is not None
        queries, keys, *rest = self.plan.split(self.sizes.parts)
        bounds = queries.to(torch.int32), keys.to(torch.int32), self.sizes.longest_segment, self.sizes.longest_keys
        layout = _FixedLayout(RaggedPlan(*bounds, *rest), self.sizes.slots, runner.make_ready())
        with torch.set_grad_enabled(self.sizes.gradient):
            leaf = self.embeds.detach().requires_grad_(self.sizes.gradient)
            output, logits = runner.run_once(PackedInputs(leaf, self.positions, layout), self.read, {})
        further = [name for name, value in output.items() if value is not None and name != "logits"]
        if further:
            raise Unsupported(f"its output has {', '.join(further)} beside logits")
        self.output_type = type(output)
        return leaf, logits

    @staticmethod
    def backward_pass(leaf: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        return torch.autograd.grad(logits, leaf, gradient)[0]

    def load(self, embeds: Tensor, positions: Tensor, read: Tensor, plan: Tensor) -> None:
        """Takes a batch; `plan` is on the host. The padding is zeros: a layer may scale by the largest number."""
        self.plan.copy_(plan, non_blocking=True)
        self.embeds[:, : embeds.shape[1]].copy_(embeds.detach())
        self.embeds[:, embeds.shape[1] :].zero_()
        self.positions[:, : positions.shape[1]].copy_(positions)
        self.read[: len(read)].copy_(read)

    def compare(self, model: Any, slack: float) -> None:
        """Compares a replay with the passes themselves.

        Raises:
            Unsupported: they differ.
        """
        leaf, logits = self.forward_pass()
        pairs = [(self.replay_forward(self.sizes.answers), logits.detach())]
        if self.sizes.gradient:
            gradient = logits.detach().sign()
            replayed = self.replay_backward(gradient, self.sizes.slots)
            pairs.append((replayed, self.backward_pass(leaf, logits, gradient)))
        for found, expected in pairs:
            difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
            if not difference <= (allowed := tolerance(model, slack)):
                raise Unsupported(f"a replay differs from the model by {difference:.1e}, more than {allowed:.0e}")

    def replay_forward(self, answers: int) -> Tensor:
        """[M, V], the first logits."""
        self._forward.replay()
        return self.logits[:answers].clone()

    def replay_backward(self, gradient: Tensor, slots: int) -> Tensor:
        """The gradient [1, K, D] of the vectors."""
        self.logits_gradient[: len(gradient)].copy_(gradient)
        self.logits_gradient[len(gradient) :].zero_()
        self._backward.replay()
        return self.gradient[:, :slots].clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeds: Tensor, graph: StepGraph, ticket: _Ticket, lock: AbstractContextManager[Any], answers: int
    ) -> Tensor:
        ctx.graph, ctx.ticket, ctx.lock, ctx.slots = graph, ticket, lock, embeds.shape[1]
        return graph.replay_forward(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.ticket.used:
            raise RuntimeError(
                "a batch that ran as a CUDA graph has one backward pass; with cuda_graphs=False, where the model is "
                "wrapped, it may have more"
            )
        with ctx.lock:  # until it is done no other batch may use the memory
            gradient = ctx.graph.replay_backward(grad, ctx.slots)
            ctx.ticket.used = True
        return gradient, None, None, None, None


class StepGraphs(ModelGraphs[StepGraph]):
    """The graphs of one model's packed batches."""

    graph_type: type[StepGraph] = StepGraph

    def __init__(self) -> None:
        super().__init__()
        self._open: weakref.ref[_Ticket] | None = None
        self._compared: set[Any] = set()
        """States of the model, with and without a gradient, whose first graph gave what the model gives."""

    def run(
        self, runner: Runner, batch: PackedInputs, read: Tensor, options: dict[str, Any]
    ) -> tuple[Any, Tensor] | None:
        """As :meth:`PackedRunner.run`; None: this batch runs as usual."""
        if self.stopped is not None or not self._fits(runner, batch, read, options):
            if len(self) and batch.inputs_embeds.is_cpu and not on_gpu(batch.inputs_embeds.device):
                self.forget()  # the model was moved
            return None
        if not self.lock.acquire(blocking=False):
            return None
        try:
            return self._run(runner, batch, read)
        finally:
            self.lock.release()

    def _fits(self, runner: Runner, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> bool:
        layout, device = batch.layout, batch.inputs_embeds.device
        config = runner.model.config.get_text_config()
        return (
            on_gpu(device)
            and layout.compiled is None
            and layout.capture is None
            and layout.observer is None
            and layout.slots > 0
            and len(read) > 0
            and not set(options) - {"num_items_in_batch"}  # which only a loss reads
            and not any(getattr(config, name, False) for name in MORE_OUTPUT)
            and not python_interferes(device)
            and backend.ops_for(device) is not None
        )

    def _run(self, runner: Runner, batch: PackedInputs, read: Tensor) -> tuple[Any, Tensor] | None:
        embeds = batch.inputs_embeds
        if not self._is_current(runner.model, embeds.device):
            return None
        lines = [*batch.layout.prompts.lines, *batch.layout.rows.lines]
        gradient = torch.is_grad_enabled() and embeds.requires_grad
        sizes = Sizes.of(lines, len(read), gradient)
        key = (sizes, embeds.dtype, embeds.device)
        open_ticket = None if self._open is None else self._open()
        if open_ticket is not None and not open_ticket.used:
            return None  # its backward pass needs the memory of the graphs
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= EAGER_BATCHES:
                return None
        plan = self._plan(sizes, lines)
        if plan is None:
            return None
        if embeds.device.type == "cuda":
            plan = plan.pin_memory()
        self._wait_for_last(embeds.device)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._new_graph(runner, sizes, (embeds, batch.position_ids, read, plan))
            if graph is None:
                return None
            self._graphs[key] = graph
            self._make_room(embeds.device)
        else:
            self._graphs.move_to_end(key)
            graph.load(embeds, batch.position_ids, read, plan)
        ticket = _Ticket()
        logits: Tensor = _Replay.apply(embeds, graph, ticket, self.lock, len(read))
        if gradient:
            self._open = weakref.ref(ticket)
        return graph.output_type(), logits

    def _new_graph(self, runner: Runner, sizes: Sizes, batch: tuple[Tensor, ...]) -> StepGraph | None:
        """A graph that holds this batch."""

        def make(pool: Any, stream: Any) -> StepGraph:
            graph = self.graph_type(runner, sizes, batch[0])
            graph.load(*batch)
            graph.capture(pool, stream)
            if runner.check and (hash(self._state), sizes.gradient) not in self._compared:
                graph.compare(runner.model, runner.slack)
                self._compared.add((hash(self._state), sizes.gradient))
            logger.info("batches of up to %d packed slots run as a CUDA graph", sizes.slots)
            return graph

        return self._captured(runner.model, batch[0].device, make)

    def _make_room(self, device: torch.device) -> None:
        most, sizes = most_memory(device), [graph.nbytes for graph in self._graphs.values()]
        while len(sizes) > 1 and (len(sizes) > MOST_GRAPHS or sum(sizes) > most):
            self._graphs.popitem(last=False)
            del sizes[0]

    @staticmethod
    def _plan(sizes: Sizes, lines: Sequence[Line]) -> Tensor | None:
        made = host_plan(sizes.padded(lines))
        if made is None:
            return None
        parts = [np.pad(part, (0, size - len(part))) for part, size in zip(made.parts, sizes.parts, strict=True)]
        return torch.from_numpy(np.concatenate(parts))
