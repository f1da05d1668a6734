"""Help for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
