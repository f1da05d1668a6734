"""Packed batches on a GPU, replayed as CUDA graphs: one launch takes the place of thousands.

On a fast GPU a step of a small model takes as long as the launches of its kernels. A graph has fixed sizes, so a batch
is padded to :class:`Sizes` that many batches have in common: its slots by segments of their own, which no other segment
reads. The padding is at most 1/16 of a batch. A batch whose sizes are new runs as usual.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base.errors import Unsupported
from ..hf.cuda_graphs import ModelGraphs, calls_as_usual, new_pool, on_gpu, side_stream
from ..ops.extension import backend
from ..ops.segment_attention.ragged import Line, RaggedPlan, host_plan
from .batch import PackedInputs
from .layout import PackedLayout, RowGroup

if TYPE_CHECKING:
    from .runner import PackedRunner

logger = logging.getLogger("softprompt_fast")
GRAIN = 16
"""Sizes are rounded up to 1/16 of their largest power of two."""
LEAST_STEP = 8
EAGER_BATCHES = 2
"""Batches of a size that run as usual before the next is captured, which takes about four steps."""
MOST_GRAPHS = 32
"""The graph that was not used for the longest time makes room."""


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

    def __init__(self, runner: PackedRunner, sizes: Sizes, like: Tensor) -> None:
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

    def capture(self, pool: Any) -> None:
        """Records the passes; what they need in between is in `pool`."""
        with side_stream(self.embeds.device) as stream:
            self._capture(pool, stream)

    def _capture(self, pool: Any, stream: Any) -> None:
        with torch.cuda.stream(stream):  # libraries make themselves ready for this stream
            leaf, logits = self.forward_pass()
            if self.sizes.gradient:
                self.backward_pass(leaf, logits, torch.zeros_like(logits))
        del leaf, logits
        # Other threads, such as a loader's that pins memory, go on meanwhile.
        options: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
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
        """Takes a batch; `plan` is on the host. What an earlier batch left in the padding is as good as any other."""
        self.plan.copy_(plan, non_blocking=True)
        self.embeds[:, : embeds.shape[1]].copy_(embeds.detach())
        self.positions[:, : positions.shape[1]].copy_(positions)
        self.read[: len(read)].copy_(read)

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
    def forward(ctx: Any, embeds: Tensor, graph: StepGraph, ticket: _Ticket, answers: int) -> Tensor:
        ctx.graph, ctx.ticket, ctx.slots = graph, ticket, embeds.shape[1]
        return graph.replay_forward(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.ticket.used:
            raise RuntimeError(
                "a batch that ran as a CUDA graph has one backward pass; SoftPromptModel(..., cuda_graphs=False) keeps "
                "what a second one needs"
            )
        ctx.ticket.used = True
        return ctx.graph.replay_backward(grad, ctx.slots), None, None, None


class StepGraphs(ModelGraphs[StepGraph]):
    """The graphs of one model's packed batches."""

    graph_type: type[StepGraph] = StepGraph

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[Any] = Counter()
        self._open: weakref.ref[_Ticket] | None = None

    def _forget(self) -> None:
        super()._forget()
        self._seen.clear()

    def run(
        self, runner: PackedRunner, batch: PackedInputs, read: Tensor, options: dict[str, Any]
    ) -> tuple[Any, Tensor] | None:
        """As :meth:`PackedRunner.run`; None: this batch runs as usual."""
        if self.stopped is not None or not self._fits(batch, read, options) or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._run(runner, batch, read)
        finally:
            self._lock.release()

    def _fits(self, batch: PackedInputs, read: Tensor, options: dict[str, Any]) -> bool:
        layout, device = batch.layout, batch.inputs_embeds.device
        return (
            on_gpu(device)
            and layout.compiled is None
            and layout.capture is None
            and layout.slots > 0
            and len(read) > 0
            and not set(options) - {"num_items_in_batch"}  # which only a loss reads
            and not calls_as_usual(device)
            and backend.ops_for(device) is not None
        )

    def _run(self, runner: PackedRunner, batch: PackedInputs, read: Tensor) -> tuple[Any, Tensor] | None:
        embeds = batch.inputs_embeds
        if not self._follow(runner.model, embeds.device):
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
        self._wait_for_last()
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._captured(runner, sizes, (embeds, batch.position_ids, read, plan))
            if graph is None:
                return None
            self._graphs[key] = graph
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(key)
            graph.load(embeds, batch.position_ids, read, plan)
        ticket = _Ticket()
        logits: Tensor = _Replay.apply(embeds, graph, ticket, len(read))
        if gradient:
            self._open = weakref.ref(ticket)
        return graph.output_type(), logits

    def _captured(self, runner: PackedRunner, sizes: Sizes, batch: tuple[Tensor, ...]) -> StepGraph | None:
        """A graph that holds this batch."""
        try:
            with torch.inference_mode(False):  # training may follow
                graph = self.graph_type(runner, sizes, batch[0])
                graph.load(*batch)
                if self._pool is None:
                    self._pool = new_pool()
                graph.capture(self._pool)
        except Exception as error:
            self._stop(runner.model, error, batch[0].device)
            return None
        logger.info("batches of up to %d packed slots run as a CUDA graph", sizes.slots)
        return graph

    @staticmethod
    def _plan(sizes: Sizes, lines: Sequence[Line]) -> Tensor | None:
        made = host_plan(sizes.padded(lines))
        if made is None:
            return None
        parts = [np.pad(part, (0, size - len(part))) for part, size in zip(made.parts, sizes.parts, strict=True)]
        return torch.from_numpy(np.concatenate(parts))
