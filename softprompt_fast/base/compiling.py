"""Help for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``torch.compiler.disable`` without its import of torch._dynamo, and without its cost where nothing is traced."""

    def disabled(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        result: Result = torch.compiler.disable(function)(*arguments, **keywords)
        return result

    disabled._torchdynamo_disable = True  # type: ignore[attr-defined]

    @wraps(function)
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return disabled(*arguments, **keywords)
        return function(*arguments, **keywords)

    return call
