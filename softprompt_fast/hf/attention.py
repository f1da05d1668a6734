"""Installs this library's attention in a transformers model. The model's own attention runs all other batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported

IMPLEMENTATION_PREFIX = "softprompt_fast_"
CARRIER_ATTRIBUTE = "_softprompt_fast_layout"
"""Attribute of a mask or of keys. Its value is the object whose ``attend`` method computes the attention."""
# Keywords that change nothing here: queries and keys already contain positions, nothing is cached or returned.
IGNORED = {"position_ids", "use_cache", "cache_position", "num_items_in_batch", "return_dict", "logits_to_keep"}
IGNORED |= {"output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "tokenizer"}
# Parts of a model's formula that an implementation of transformers leaves out. We leave them out too, to equal it.
IGNORED_BY = {"sdpa": {"softcap", "s_aux"}}


Attention = Callable[..., tuple[Tensor, Tensor | None]]


def check_keywords(module: Any, is_causal: bool | None, keywords: dict[str, Any]) -> None:
    """Raises Unsupported for attention that is not causal or gets an unknown keyword."""
    unknown = sorted(k for k, v in keywords.items() if k not in IGNORED and v is not None and v is not False)
    if unknown:
        raise Unsupported(f"its attention uses a keyword unknown here: {', '.join(unknown)}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise Unsupported("its attention is not causal")


def install(model: Any) -> None:
    """Lets a model run packed batches; every other call uses the implementation that it has now.

    Raises:
        Unsupported: its attention cannot be replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    if before.startswith(IMPLEMENTATION_PREFIX):
        return
    if before == "eager":
        original: Attention = _eager_attention
    elif before in ALL_ATTENTION_FUNCTIONS:
        original = ALL_ATTENTION_FUNCTIONS[before]
    else:
        raise Unsupported(f"its attention implementation {before!r} is not a function that can be wrapped")
    name = IMPLEMENTATION_PREFIX + before
    ignored = IGNORED_BY.get(before, set())

    @torch.compiler.disable  # the carrier is another object in every batch
    def attend(carrier: Any, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = carrier.attend(*args, **keywords)
        return result

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        carrier = getattr(key, CARRIER_ATTRIBUTE, None) or getattr(attention_mask, CARRIER_ATTRIBUTE, None)
        if carrier is None:
            return original(module, query, key, value, attention_mask, *args, **keywords)
        if args:
            raise Unsupported("its attention passes arguments by position")
        used = {k: v for k, v in keywords.items() if k not in ignored}
        return attend(carrier, module, query, key, value, **used)

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        if before in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise Unsupported("its attention implementation cannot be set")


def _eager_attention(module: Any, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the file that defines the model."""
    defined_in = sys.modules[type(module).__module__]
    result: tuple[Tensor, Tensor | None] = defined_in.eager_attention_forward(module, *args, **keywords)
    return result


def uninstall(model: Any) -> None:
    """Gives a model back the attention implementation it had."""
    name = model.config._attn_implementation
    if name.startswith(IMPLEMENTATION_PREFIX):
        model.set_attn_implementation(name.removeprefix(IMPLEMENTATION_PREFIX))
