"""Facts about transformers models that decide whether and how a soft prompt can be put in front of their input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..base.errors import Unsupported
from . import adapters

# Heads whose result would be wrong with a prompt in front: they pool a fixed position or return positions.
DISPLACED_HEADS = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining")
# Configuration fields of models that embed each token again in every layer.
PER_LAYER_EMBEDDINGS = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT model, whose adapters are part of its layers; any other model itself."""
    while hasattr(model, "peft_config"):
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif type(model).__name__ == "PeftMixedModel":
            inner = model.base_model.model
        else:  # a transformers model that has adapters of its own (`add_adapter`)
            return model
        model = inner
    return model


def is_named(model: Any, endings: str | tuple[str, ...]) -> bool:
    """Whether the name of a model's class, or of a class that it is derived from, has one of these endings."""
    return any(owner.__name__.endswith(endings) for owner in type(without_adapters(model)).__mro__)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def is_causal(model: Any) -> bool:
    """Whether a token only sees the tokens before it: a decoder, with any head."""
    if is_encoder_decoder(model):
        return False
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate() and not is_named(model, "ForMaskedLM"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def pools_last_token(model: Any) -> bool:
    """Sequence classification on a decoder: without input ids transformers reads the last position."""
    return is_named(model, "ForSequenceClassification")


def compiled_in_place(model: Any) -> Any:
    """The model in a wrapper that torch.compile returned, compiled as ``model.compile()`` does it with these settings.

    Such a wrapper is not a transformers model: it has another class, and its ``generate`` runs uncompiled.
    """
    original, context = vars(model).get("_modules", {}).get("_orig_mod"), getattr(model, "dynamo_ctx", None)
    if original is None or context is None:  # a PEFT model of a compiled one has these by its `__getattr__`
        return model
    check_supported(original)
    original._compiled_call_impl = context(original._call_impl)
    return original


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
    if reason := adapters.reason_against(model):
        raise TypeError(f"{name} cannot use a prompt: {reason}")
    if "inputs_embeds" not in forward_parameters(model):
        raise TypeError(f"{name}.forward takes no inputs_embeds, so it cannot use a prompt")
    if is_named(model, DISPLACED_HEADS):
        raise TypeError(f"{name} returns or pools positions that a prompt would displace; this head is not supported")
    if pools_last_token(model) and not is_causal(model):
        raise TypeError(
            f"{name} pools the first position, where the prompt would be; use the model with a "
            "language-modelling or token-classification head"
        )


def forward_parameters(model: Any) -> set[str]:
    return set(inspect.signature(without_adapters(model).forward).parameters)


def cache_keyword(model: Any) -> str:
    """The name by which a model's forward and ``generate`` take a cache; transformers 5.24 has another."""
    parameters = forward_parameters(model)
    return "cache" if "cache" in parameters and "past_key_values" not in parameters else "past_key_values"


def accepts_any_keyword(model: Any) -> bool:
    parameters = inspect.signature(without_adapters(model).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@dataclass(frozen=True)
class ForwardTraits:
    """How a model's forward takes its inputs, and the kind of its output."""

    parameters: frozenset[str]
    any_keyword: bool
    encoder_decoder: bool
    causal: bool
    pools_last_token: bool
    context_length: int | None

    @classmethod
    def of(cls, model: Any) -> ForwardTraits:
        return cls(
            parameters=frozenset(forward_parameters(model)),
            any_keyword=accepts_any_keyword(model),
            encoder_decoder=is_encoder_decoder(model),
            causal=is_causal(model),
            pools_last_token=pools_last_token(model),
            context_length=context_length(model),
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
    if is_encoder_decoder(model):
        task = "SEQ_2_SEQ_LM"
    elif is_named(model, "ForSequenceClassification"):
        task = "SEQ_CLS"
    elif is_named(model, "ForTokenClassification"):
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


def context_length(model: Any) -> int | None:
    """The largest number of tokens of a row of a model, its prompt included.

    None: positions are relative and the configuration sets no limit. An encoder-decoder's limit is its encoder's.
    """
    model = without_adapters(model)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if getattr(config, "position_biased_input", True) is False:  # DeBERTa without a table of positions
        return None
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None and not hasattr(config, "relative_attention_num_buckets"):  # old T5 files hold an n_positions
        limit = getattr(config, "n_positions", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    table = _positions_after_padding(model)
    return limit if table is None else min(limit, int(table.weight.shape[0]) - int(table.padding_idx) - 1)


def first_position(model: Any) -> int:
    """The number that a model's forward gives a row's first position: 0, or the one after the padding's."""
    table = _positions_after_padding(without_adapters(model))
    return 0 if table is None else int(table.padding_idx) + 1


def _positions_after_padding(model: Any) -> Any:
    """The table of positions of RoBERTa and its kin, which begin after the padding's; None: another model."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module
    return None


def check_room(virtual: Sequence[int], tokens: Sequence[int], limit: int | None) -> None:
    """Checks that every row fits the model's positions.

    Args:
        virtual: [B], virtual tokens of each row's prompt.
        tokens: [B], tokens of each row's text.
        limit: as :func:`context_length` gives it.

    Raises:
        ValueError: with the numbers of the first row that is too long.
    """
    for row, (prompt, text) in enumerate(zip(virtual, tokens, strict=True)):
        if limit is not None and prompt + text > limit:
            raise ValueError(
                f"`input_ids` must fit the model's {limit} positions together with the prompt: "
                f"got {text} tokens after {prompt} virtual tokens in row {row}"
            )


@contextmanager
def returning_mappings(config: Any) -> Iterator[None]:
    """Lets a model return its output classes even if its configuration asks for tuples.

    An argument cannot: transformers' decoders fail with ``config.return_dict = False`` whatever they are given.
    """
    if getattr(config, "return_dict", True):
        yield
        return
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = False


LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(model: Any) -> None:
    """Checks by class and configuration whether a model can run the packed layout.

    Raises:
        Unsupported: it cannot; with the reason.
    """
    if is_encoder_decoder(model) or not is_causal(model):
        raise Unsupported("only causal decoders can share a prompt's hidden states")
    model = _unadapted(model)
    if model.get_output_embeddings() is None:
        raise Unsupported(f"{type(model).__name__} has no language-modelling head")
    if not is_named(model, CAUSAL_HEADS):
        raise Unsupported(f"{type(model).__name__} is not one of transformers' causal language models")
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


def _unadapted(model: Any) -> Any:
    """The model to run packed batches with: adapters inside its layers (LoRA) run, prompts of PEFT would not."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise Unsupported(f"it has a prompt of PEFT, {name!r}, which the packed layout does not run")
    return without_adapters(model)
