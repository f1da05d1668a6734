"""The op that joins prompts and token embeddings into a batch."""

from .batch import PackedRows, PromptedBatch
from .functional import assemble
from .reference import assemble as assemble_reference

__all__ = ["PackedRows", "PromptedBatch", "assemble", "assemble_reference"]
