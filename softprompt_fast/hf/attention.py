"""Installs this library's attention in a transformers model. The model's own attention runs all other batches.

The installation belongs to the base model, not to one of its users. :func:`installed_attention` gives all of them the
same object, and the model gets its own implementation back when the last reference to it is gone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported

IMPLEMENTATION_PREFIX = "softprompt_fast_"
CARRIER_ATTRIBUTE = "_softprompt_fast_layout"
"""Attribute of a mask or of keys. Its value is the object whose ``attend`` method computes the attention."""
HANDLE_ATTRIBUTE = "_softprompt_fast_handle"
"""Attribute of a mask with a carrier: a tensor by which a compiled model finds the carrier of each batch. The carrier
has a method ``attend_traced``, which torch.compile can trace."""
# Keywords that change nothing here: queries and keys already contain positions, nothing is cached or returned.
IGNORED = {"position_ids", "use_cache", "cache_position", "num_items_in_batch", "return_dict", "logits_to_keep"}
IGNORED |= {
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "cache",
    "position_embeddings",
    "tokenizer",
}
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


class InstalledName(str):
    """The name of an installed implementation. A copied, pickled or saved model names its own implementation again."""

    __slots__ = ()

    @property
    def original(self) -> str:
        return str(self.removeprefix(IMPLEMENTATION_PREFIX))

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.original,)


class InstalledAttention:
    """Keeps this library's attention installed in a model for as long as a reference to this object lives.

    Args:
        config: the configuration that the model's attention layers read.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        _put_in_front(config)
        weakref.finalize(self, _restore, config).atexit = False

    def ensure(self) -> bool:
        """Installs again if another implementation was set meanwhile; returns whether one was.

        Raises:
            Unsupported: the new implementation cannot be replaced.
        """
        if isinstance(self.config._attn_implementation, InstalledName):
            return False
        with _lock:
            _put_in_front(self.config)
        return True


_lock = threading.RLock()
_installed: weakref.WeakValueDictionary[int, InstalledAttention] = weakref.WeakValueDictionary()
"""By the identity of the configuration, which the value keeps alive."""


def installed_attention(model: Any) -> InstalledAttention:
    """Lets a model run packed batches; every other call uses the implementation that it has now.

    Raises:
        Unsupported: its attention cannot be replaced.
    """
    config = model.config.get_text_config()
    with _lock:
        installed = _installed.get(id(config))
        if installed is None:
            installed = _installed[id(config)] = InstalledAttention(config)
        installed.ensure()
        return installed


def _put_in_front(config: Any) -> None:
    """Installs this library's attention in front of the implementation that a configuration names."""
    before = config._attn_implementation
    if isinstance(before, InstalledName):
        return
    if not isinstance(before, str):
        raise Unsupported(f"its attention implementation {before!r} is not a function that can be wrapped")
    before = before.removeprefix(IMPLEMENTATION_PREFIX)
    _register(before)
    config._attn_implementation = InstalledName(IMPLEMENTATION_PREFIX + before)


def _restore(config: Any) -> None:
    with _lock:
        name = config._attn_implementation
        if isinstance(name, InstalledName) and id(config) not in _installed:
            config._attn_implementation = name.original


def _register(before: str) -> None:
    """Registers the implementation that runs packed batches itself and gives all others to the one named `before`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if before == "eager":
        original: Attention = _eager_attention
    elif before in ALL_ATTENTION_FUNCTIONS:
        original = ALL_ATTENTION_FUNCTIONS[before]
    else:
        raise Unsupported(f"its attention implementation {before!r} is not a function that can be wrapped")
    name = IMPLEMENTATION_PREFIX + before
    ignored = IGNORED_BY.get(before, set())

    @torch.compiler.disable  # runs as it is written, between two compiled parts of the model
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
        if torch.compiler.is_compiling():
            handle = getattr(attention_mask, HANDLE_ATTRIBUTE, None)
            if handle is not None and not used.get("dropout"):  # an opaque op would draw other numbers in its backward
                traced: tuple[Tensor, Tensor | None] = carrier.attend_traced(handle, module, query, key, value, **used)
                return traced
        return attend(carrier, module, query, key, value, **used)

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        if before in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])


def _eager_attention(module: Any, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the file that defines the model, or of the class that it is derived from."""
    for owner in type(module).__mro__:
        function: Attention | None = getattr(sys.modules.get(owner.__module__), "eager_attention_forward", None)
        if function is not None:
            return function(module, *args, **keywords)
    raise Unsupported(f"its file {type(module).__module__} has no eager attention function")
