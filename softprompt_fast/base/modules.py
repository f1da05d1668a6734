"""Helpers for ``torch.nn.Module``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Sets a model to evaluation mode; afterwards every module is in its own mode again, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """As :func:`evaluating`. The caller's settings of gradients, inference mode and autocast do not count within."""
    kind = next(model.parameters()).device.type
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), plain, evaluating(model):
        yield


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it none of the parameters gets a gradient."""
    kept = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)
