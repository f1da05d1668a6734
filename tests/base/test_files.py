"""Files that are written whole, with the same bytes for the same contents."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from softprompt_fast.base.files import save_tensors_atomically


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2)}
    metadata = {"z": "1", "format": "pt", "base": "ü: {x}", "another": "4"}
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        save_tensors_atomically(path, tensors, metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"]) and torch.equal(file.get_tensor("a"), tensors["a"])
