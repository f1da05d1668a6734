"""The adapters of a PEFT model: which can be accelerated, and the vectors of the active one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hf import architecture

PLAIN = ("PROMPT_TUNING", "P_TUNING")
"""PEFT's types whose prompts are vectors at the input."""
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's types whose prompts are keys and values of every layer."""
TASKS = (
    "PeftModelForCausalLM",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftModelForQuestionAnswering",
)


def adapter_type(config: Any) -> str:
    """The name of a PEFT configuration's type."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_adapters(model: Any, own_class: type) -> None:
    """Checks that every adapter of a PEFT model can be accelerated.

    Args:
        own_class: the model's class, one of TASKS or derived from one.

    Raises:
        TypeError: naming the adapter and the reason.
    """
    names = {owner.__name__ for owner in own_class.__mro__}
    if not model.peft_config:
        raise TypeError("`peft_model` must have an adapter, got none")
    for name, config in model.peft_config.items():
        kind = adapter_type(config)
        if kind not in PLAIN + PREFIXES:
            raise TypeError(
                f"the {kind} adapter {name!r} cannot be accelerated: only prompts are, of types "
                f"{', '.join(PLAIN + PREFIXES)}"
            )
        if kind in PREFIXES and "PeftModelForCausalLM" not in names:
            base = type(model.base_model).__name__
            raise TypeError(f"the {kind} adapter {name!r} of {base} cannot be accelerated: it is no causal model")
    encoder_decoder = architecture.is_encoder_decoder(model.base_model)
    if encoder_decoder != ("PeftModelForSeq2SeqLM" in names):
        base = type(model.base_model).__name__
        raise TypeError(f"{own_class.__name__} of {base} cannot be accelerated: its encoder or decoder is unexpected")


def is_prefix(model: Any) -> bool:
    """Whether the active adapter is keys and values, not vectors at the input."""
    return adapter_type(model.active_peft_config) in PREFIXES


def active_prompt(model: Any) -> Tensor:
    """The active adapter's prompt: [P, D], or [P, W] of a prefix with W = L * 2 * H' * E.

    While it is trained, its encoder computes it, so that gradients reach what the optimiser holds.
    """
    config, name = model.active_peft_config, model.active_adapter
    encoder, length = model.prompt_encoder[name], config.num_virtual_tokens
    weight: Tensor = encoder.embedding.weight
    if config.inference_mode:
        return weight[:length]  # an encoder-decoder's table has a second half for its decoder, which PEFT does not use
    tokens = model.prompt_tokens[name][:length].to(weight.device)
    prompt: Tensor = encoder(tokens[None])[0]
    return prompt


def padding_differs(attention_mask: Tensor | None, *, on_the_right: bool) -> bool:
    """Whether PEFT's results for a batch depend on its padding.

    Args:
        attention_mask: [B, T]
        on_the_right: also after a row's last token, not only before or between tokens.
    """
    if attention_mask is None:
        return False
    real = attention_mask != 0
    if on_the_right:
        return not bool(real.all())
    return bool((real[:, 1:] & ~real[:, :-1]).any())


def inferred_mask(model: Any, input_ids: Tensor, options: dict[str, Any]) -> Tensor | None:
    """[B, T], the mask that transformers' ``generate`` assumes where none is given; None: no padding."""
    from ..hf.generation_options import setting

    pad, end = (setting(model, options, name) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else end if isinstance(end, list) else [end]
    if pad is None or pad in ends or not (input_ids == pad).any():
        return None
    return (input_ids != pad).to(torch.int64)
