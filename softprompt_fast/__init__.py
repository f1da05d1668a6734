"""Soft prompts for frozen language models: joined in one fused pass, tuned and served without waste."""

from .batch import PackedRows, PromptedBatch
from .functional import assemble

__version__ = "0.1.0"
__all__ = ["PackedRows", "PromptedBatch", "assemble", "__version__"]
