"""Steps of ``generate`` that run as CUDA graphs, played on the CPU.

A step is recorded as the operations on tensors that it consists of. A replay runs these again and no Python of the
model. So, as in a CUDA graph, a number that Python computed while it was recorded stays the same for ever, and a step
that reads a number of a tensor cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from softprompt_fast import hf
from softprompt_fast.compiled import cache, decoding
from softprompt_fast.compiled.decode_graph import DecodeGraph
from support.varlen_stand_in import path_of_a_gpu


class PlayedSteps(DecodeGraph):
    """A step that is recorded by torch.fx."""

    captured = 0
    replays = 0

    def capture(self, forward: Callable[..., Any], pool: Any, stream: Any) -> None:
        PlayedSteps.captured += 1
        with torch.no_grad():
            recorded = make_fx(lambda: self.forward_pass(forward))()
        self.logits = recorded().clone()

        def replay() -> None:
            PlayedSteps.replays += 1
            with torch.no_grad():
                self.logits.copy_(recorded())

        self._graph = SimpleNamespace(replay=replay)


@contextmanager
def played_steps() -> Iterator[type[PlayedSteps]]:
    PlayedSteps.captured = PlayedSteps.replays = 0
    with (
        path_of_a_gpu(),
        mock.patch.object(cache, "available", lambda query: False),
        mock.patch.object(decoding, "on_gpu", lambda device: True),
        mock.patch.object(hf.cuda_graphs, "new_pool", lambda: None),
        mock.patch.object(decoding, "most_memory", lambda device: 1e9),
        mock.patch.object(decoding.DecodeGraphs, "graph_type", PlayedSteps),
    ):
        yield PlayedSteps
