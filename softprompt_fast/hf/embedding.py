"""The facts about a model's input embedding module that the fused pass needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.compiling import constant_when_compiled

LOOKUP_SCALE = "_softprompt_fast_lookup_scale"
"""Attribute of an embedding module: the factor that its model, not the module, applies to looked-up vectors."""
CHECKED_SCALE = "_softprompt_fast_checked_scale"
"""Attribute of an embedding module: its own factor, what it was checked with, and its value."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A look-up table, and the factor its module applies to the vectors."""

    weight: Tensor
    """[V, D]"""
    scale: float = 1.0
    """Factor on the vectors, as rounded by the module (Gemma, BART and others multiply by sqrt(D)) or its model."""
    padding_idx: int | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """[...] ids -> [..., D], as the model itself computes them."""
        vectors = torch.nn.functional.embedding(input_ids, self.weight)
        return vectors * self.scale if self.scale != 1.0 else vectors


def embedding_table(embedding: nn.Module | Tensor) -> EmbeddingTable:
    """The table of an embedding module that is a look-up, possibly times a constant.

    Args:
        embedding: ``nn.Embedding``, a subclass that multiplies by its ``embed_scale``, or a weight [V, D].

    Raises:
        TypeError: any other module; its output could not be reproduced from its weight.
    """
    if isinstance(embedding, Tensor):
        return EmbeddingTable(embedding)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            f"`embedding` must be a torch.nn.Embedding or its weight [V, D], got {type(embedding).__name__}"
        )
    if embedding.max_norm is not None:
        raise TypeError("`embedding` cannot have max_norm, which the fused pass would not apply")
    if embedding.weight.device.type == "meta":
        raise TypeError("`embedding` must be on a real device, got a weight on 'meta' (is it offloaded?)")
    hooks = _hooks(embedding)
    if hooks:
        raise TypeError(f"`embedding` cannot have forward hooks, which the fused pass would not run, got {hooks[0]}")
    weight = embedding.weight
    if hasattr(weight, "full_tensor"):  # sharded by FSDP
        weight = weight.full_tensor()
    scale = 1.0 if type(embedding) is nn.Embedding else _scale_of(embedding)
    scale *= getattr(embedding, LOOKUP_SCALE, 1.0)
    return EmbeddingTable(weight, scale, embedding.padding_idx)


def has_foreign_hooks(embedding: nn.Module) -> bool:
    """Whether something else changes the vectors that a module looks up, such as NEFTune's noise."""
    return bool(_hooks(embedding))


def _hooks(embedding: nn.Module) -> list[Any]:
    hooks = [*embedding._forward_hooks.values(), *embedding._forward_pre_hooks.values()]
    # transformers registers this one for gradient checkpointing. It is not needed: the prompt has a gradient itself.
    return [hook for hook in hooks if getattr(hook, "__name__", "") != "make_inputs_require_grads"]


@constant_when_compiled
def _scale_of(embedding: nn.Embedding) -> float:
    """The constant a subclass multiplies by; a few rows verify that its forward does nothing else. Waits once."""
    weight = embedding.weight.detach()
    factor = getattr(embedding, "embed_scale", None)
    key = (factor._version if isinstance(factor, Tensor) else factor, weight.dtype, weight.data_ptr())
    known = getattr(embedding, CHECKED_SCALE, None)
    if known is not None and known[0] is factor and known[1] == key:
        return float(known[2])
    scale = 1.0 if factor is None else float(factor)
    if isinstance(factor, Tensor):  # Gemma rounds it to the weight's dtype first
        scale = factor.to(weight.dtype).item()
    # The last ids are where models keep special tokens, which some embed in their own way.
    count = weight.shape[0]
    ids = torch.unique(torch.tensor([0, 1, 2, count // 2, count - 2, count - 1]).clamp(0, count - 1)).to(weight.device)
    special = [value for name, value in vars(embedding).items() if name.endswith("_index") and isinstance(value, int)]
    with torch.no_grad():
        equal = torch.equal(embedding(ids), EmbeddingTable(weight, scale)(ids))
    if not equal or special:
        raise TypeError(
            f"`embedding` must be a look-up times a constant, but {type(embedding).__name__} is not: "
            "its output differs from weight[ids] * embed_scale"
        )
    setattr(embedding, CHECKED_SCALE, (factor, key, scale))
    return scale
