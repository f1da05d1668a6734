"""Facts about transformers models that decide whether and how a soft prompt can be put in front of their input."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..base.errors import Unsupported

# Heads whose result would be wrong with a prompt in front: they pool a fixed position or return positions.
DISPLACED_HEADS = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining")
# Configuration fields of models that embed each token again in every layer.
PER_LAYER_EMBEDDINGS = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def is_causal(model: Any) -> bool:
    """Whether a token only sees the tokens before it: a decoder, with any head."""
    if is_encoder_decoder(model):
        return False
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate() and not type(model).__name__.endswith("ForMaskedLM"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def pools_last_token(model: Any) -> bool:
    """Sequence classification on a decoder: without input ids transformers reads the last position."""
    return type(model).__name__.endswith("ForSequenceClassification")


def check_supported(model: Any) -> None:
    """Refuses models whose results would be wrong with a prompt in front of ``inputs_embeds``.

    Raises:
        TypeError: with the model's class and the reason.
    """
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"`model` must be a transformers model, got {name}")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if any(getattr(config, field, None) for field in PER_LAYER_EMBEDDINGS):
        raise TypeError(
            f"{name} embeds every token again in each layer (per-layer embeddings) and needs input_ids as well as "
            "inputs_embeds; a soft prompt has no token ids, so this model cannot use one"
        )
    if "inputs_embeds" not in forward_parameters(model):
        raise TypeError(f"{name}.forward takes no inputs_embeds, so it cannot use a prompt")
    if name.endswith(DISPLACED_HEADS):
        raise TypeError(f"{name} returns or pools positions that a prompt would displace; this head is not supported")
    if pools_last_token(model) and not is_causal(model):
        raise TypeError(
            f"{name} pools the first position, where the prompt would be; use the model with a "
            "language-modelling or token-classification head"
        )


def forward_parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def accepts_any_keyword(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@dataclass(frozen=True)
class ForwardTraits:
    """How a model's forward takes its inputs, and the kind of its output."""

    parameters: frozenset[str]
    any_keyword: bool
    encoder_decoder: bool
    causal: bool
    pools_last_token: bool

    @classmethod
    def of(cls, model: Any) -> ForwardTraits:
        return cls(
            parameters=frozenset(forward_parameters(model)),
            any_keyword=accepts_any_keyword(model),
            encoder_decoder=is_encoder_decoder(model),
            causal=is_causal(model),
            pools_last_token=pools_last_token(model),
        )

    @property
    def predicts_next_token(self) -> bool:
        return self.causal and not self.pools_last_token

    @property
    def labels_per_token(self) -> bool:
        """Whether there is one label, and one output, per input token."""
        return not self.encoder_decoder and not self.pools_last_token


def peft_config(model: Any) -> dict[str, Any]:
    """The model's fields of PEFT's ``adapter_config.json``."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    name = type(model).__name__
    if is_encoder_decoder(model):
        task = "SEQ_2_SEQ_LM"
    elif name.endswith("ForSequenceClassification"):
        task = "SEQ_CLS"
    elif name.endswith("ForTokenClassification"):
        task = "TOKEN_CLS"
    elif is_causal(model) and getattr(model, "can_generate", lambda: False)():
        task = "CAUSAL_LM"
    else:
        task = "FEATURE_EXTRACTION"
    return {
        "task_type": task,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
    }


def context_length(config: Any) -> int | None:
    """The largest number of positions of a model; None: positions are relative and the configuration sets no limit."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(model: Any) -> None:
    """Checks by class and configuration whether a model can run the packed layout.

    Raises:
        Unsupported: it cannot; with the reason.
    """
    if is_encoder_decoder(model) or not is_causal(model):
        raise Unsupported("only causal decoders can share a prompt's hidden states")
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise Unsupported("its head is not a language model's")
    if not model._can_set_attn_implementation():
        raise Unsupported("its class ignores transformers' attention interface")
    if "position_ids" not in forward_parameters(model):
        raise Unsupported("its forward takes no position_ids")
    config = model.config.get_text_config()
    if getattr(config, "alibi", False):
        raise Unsupported("it adds ALiBi to attention scores")
    if getattr(config, "output_router_logits", False):
        raise Unsupported("its loss includes a router loss over all positions")
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise Unsupported(f"it has layers of type {', '.join(sorted(other))}")
    if getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        raise Unsupported(f"its loss is {model.loss_type}")
