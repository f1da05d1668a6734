"""The native ops, each beside its reference in plain PyTorch, and how they are built."""
