"""CUDA graphs of packed batches, played on the CPU: a replay runs the passes again and fills the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from softprompt_fast import hf
from softprompt_fast.packed import cuda_graphs
from softprompt_fast.packed.cuda_graphs import StepGraph
from support.varlen_stand_in import path_of_a_gpu


class PlayedGraph(StepGraph):
    """The passes of a graph, in Python. What lies between them is lost when another graph is replayed."""

    latest: PlayedGraph | None = None
    replays = 0

    def capture(self, pool: Any, stream: Any) -> None:
        leaf, logits = self.forward_pass()
        self.logits, self.logits_gradient = logits.detach().clone(), torch.zeros_like(logits)
        self.gradient = torch.zeros_like(leaf)
        self._forward = SimpleNamespace(replay=self._play_forward)
        self._backward = SimpleNamespace(replay=self._play_backward)

    def _play_forward(self) -> None:
        PlayedGraph.replays += 1
        PlayedGraph.latest = self
        with torch.inference_mode(False):
            self._passed = self.forward_pass()
            self.logits.copy_(self._passed[1].detach())

    def _play_backward(self) -> None:
        assert PlayedGraph.latest is self
        self.gradient.copy_(self.backward_pass(*self._passed, self.logits_gradient))


@contextmanager
def played_graphs() -> Iterator[type[PlayedGraph]]:
    """Packed batches run as played graphs meanwhile."""
    PlayedGraph.replays = 0
    with (
        path_of_a_gpu(),
        mock.patch.object(cuda_graphs, "on_gpu", lambda device: True),
        mock.patch.object(hf.cuda_graphs, "new_pool", lambda: None),
        mock.patch.object(cuda_graphs, "most_memory", lambda device: 1e9),
        mock.patch.object(cuda_graphs.StepGraphs, "graph_type", PlayedGraph),
    ):
        yield PlayedGraph
