"""The facts about a model's input embedding module that the fused pass needs.

Most modules are a table, which the fused pass reads itself. Some must be called: a table that adapters of PEFT change,
one that is offloaded, or one with quantised numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.compiling import constant_when_compiled
from .adapters import NAMES

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


def own_embedding(module: Any) -> Any:
    """An embedding module without what PEFT has put around it."""
    while hasattr(module, NAMES):
        own = vars(module)["_modules"]
        adapter = own.get("token_adapter")  # trainable tokens, which wrap the module twice
        module = own.get("base_layer") or own.get("original_module") or adapter.base_layer
    return module


def vectors_like(embedding: Any) -> Tensor:
    """An empty tensor [0, D] with the dtype and the device of the vectors that an embedding module looks up."""
    embedding = own_embedding(embedding)
    weight = embedding.weight
    device = weight.device
    if device.type == "meta":
        device = torch.device(getattr(_offloading_hook(embedding), "execution_device", None) or "meta")
    if not weight.is_floating_point() and device.type != "meta":
        with torch.no_grad():
            vectors: Tensor = embedding(torch.zeros(1, dtype=torch.int64, device=device))
        return vectors[:0]
    return torch.empty(0, weight.shape[1], dtype=weight.dtype, device=device)


def vocabulary_size(embedding: Any) -> int:
    """The number of vectors that an embedding module can look up."""
    embedding = own_embedding(embedding)
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def must_be_called(embedding: Any) -> bool:
    """Whether only calling an embedding module gives its vectors, because no weight of it is their table."""
    if not isinstance(embedding, nn.Module):
        return False
    if hasattr(embedding, NAMES) or _offloading_hook(embedding) is not None:
        return True
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or hasattr(weight, "full_tensor"):
        return False
    return isinstance(embedding, nn.Embedding) and (
        not weight.is_floating_point() or type(weight.data) is not Tensor or has_foreign_hooks(embedding)
    )


def looked_up(embedding: Any, input_ids: Tensor) -> tuple[Tensor, Any]:
    """Ids [B, T] and the table or module of their vectors, which the fused pass reads.

    If the module must be called, they are its vectors [B * T, D] and the tokens' places among them.
    """
    if not must_be_called(embedding):
        return input_ids, embedding
    vectors = embedding(input_ids) * getattr(embedding, LOOKUP_SCALE, 1.0)
    return torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape), vectors.flatten(0, -2)


def token_vectors(embedding: Any, input_ids: Tensor) -> Tensor:
    """[..., D], the vectors of ids [...] as the model itself computes them."""
    ids, source = looked_up(embedding, input_ids)
    return embedding_table(source)(ids)


def check_whole(model: Any) -> None:
    """Refuses a model whose embedding is not on this process.

    Raises:
        TypeError: DeepSpeed has partitioned it.
    """
    if hasattr(getattr(own_embedding(model.get_input_embeddings()), "weight", None), "ds_id"):
        raise TypeError(
            f"{type(model).__name__} cannot use a prompt: DeepSpeed ZeRO-3 has partitioned its parameters, as it would "
            "those of prompts. Use ZeRO-2 or lower, or shard the base model by FSDP2"
        )


def embedding_table(embedding: nn.Module | Tensor) -> EmbeddingTable:
    """The table of an embedding module that is a look-up, possibly times a constant.

    The table of a module that must be called is computed, of all ids; :func:`token_vectors` computes only those of a
    text.

    Args:
        embedding: ``nn.Embedding``, a subclass that multiplies by its ``embed_scale``, or a weight [V, D].

    Raises:
        TypeError: any other module; its output could not be reproduced from its weight.
    """
    if isinstance(embedding, Tensor):
        return EmbeddingTable(embedding)
    if must_be_called(embedding) and not has_foreign_hooks(embedding):
        return _computed_table(embedding)
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


@torch.no_grad()
def _computed_table(embedding: Any) -> EmbeddingTable:
    ids = torch.arange(vocabulary_size(embedding), device=vectors_like(embedding).device)
    return EmbeddingTable(looked_up(embedding, ids)[1])


def _offloading_hook(module: nn.Module) -> Any:
    """The hook by which accelerate brings a module's weights from where they are offloaded; None: they are here."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", None) or (hook,)
    return next((one for one in hooks if getattr(one, "offload", False)), None)


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
