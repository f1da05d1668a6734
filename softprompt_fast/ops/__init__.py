"""The native ops, each with its reference in plain PyTorch, and the extension that contains them."""

# Packages, imported on demand: `extension.build` must not load the others, which import torch.
__all__ = ["assemble", "extension", "packing", "segment_attention"]
