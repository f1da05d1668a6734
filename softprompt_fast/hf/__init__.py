"""What depends on how transformers works inside. Few other files should change with a transformers upgrade."""

from .loading import SMOLLM2, load_base_model

__all__ = [
    "SMOLLM2",
    "load_base_model",
]
