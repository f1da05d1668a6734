"""Other libraries' models on this library's layouts: PEFT models that run in place."""

from .acceleration import accelerate, restore

__all__ = ["accelerate", "restore"]
