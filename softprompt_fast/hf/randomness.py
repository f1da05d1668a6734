"""Whether a model draws random numbers."""

from __future__ import annotations

from typing import Any

from torch import nn


def draws_random_numbers(model: Any) -> bool:
    """Whether a second run of a model in training would draw other random numbers than the first."""
    values = vars(model.config.get_text_config()).items()
    if any(("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0 for name, value in values):
        return True
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
