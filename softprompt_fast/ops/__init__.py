"""The native ops, each with its reference in plain PyTorch, and the extension that contains them."""

from . import assemble, extension, packing, segment_attention

__all__ = ["assemble", "extension", "packing", "segment_attention"]
