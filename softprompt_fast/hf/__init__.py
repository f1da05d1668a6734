"""Everything that depends on how transformers works inside: an upgrade of transformers should change only this."""

from .loading import SMOLLM2, load_base_model

__all__ = [
    "SMOLLM2",
    "load_base_model",
]
