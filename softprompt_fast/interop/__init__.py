"""Other libraries' models and trainers on this library's layouts. ``trl`` and ``lm_eval`` are imported by name."""

from .acceleration import accelerate, restore
from .reference import reference_model

__all__ = ["accelerate", "reference_model", "restore"]
