"""Other libraries' models and files on this library's layouts."""

from .acceleration import accelerate, restore

__all__ = ["accelerate", "restore"]
