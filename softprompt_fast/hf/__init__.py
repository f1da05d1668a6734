"""Everything that depends on how transformers works inside: an upgrade of transformers should change only this."""

from .head_loading import ModelWithHead, load_model_with_head
from .loading import SMOLLM2, load_base_model

__all__ = [
    "SMOLLM2",
    "ModelWithHead",
    "load_base_model",
    "load_model_with_head",
]
