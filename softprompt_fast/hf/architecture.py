"""Facts about transformers models that decide whether and how a soft prompt can be put in front of their input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..base.errors import Unsupported
from . import adapters

# Heads that read several texts of a row, or pool one position for one result and use all for another.
UNSUPPORTED_HEADS = ("ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining")
# Arguments of heads for question answering that search among positions, or read one that the caller names.
UNSUPPORTED_ARGUMENTS = {"p_mask", "question_positions"}
# Configuration fields of models that embed each token again in every layer.
PER_LAYER_EMBEDDINGS = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


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
    """Whether a model runs an encoder and a decoder; the encoder of such a model alone does not."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in forward_parameters(model)


def is_causal(model: Any) -> bool:
    """Whether a token only sees the tokens before it: a decoder, with any head."""
    if is_encoder_decoder(model):
        return False
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate() and not is_named(model, "ForMaskedLM"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def classifies_rows(model: Any) -> bool:
    """Sequence classification: a decoder reads a row's last position, most encoders the first."""
    return is_named(model, "ForSequenceClassification")


def pools_last_token(model: Any) -> bool:
    """Whether rows are classified by their last position: transformers reads it in decoders that are given vectors."""
    return classifies_rows(model) and (is_causal(model) or _is_of_decoders(model))


def _is_of_decoders(model: Any) -> bool:
    """Whether transformers has models of a type that predict the next token, and none that fill in masked ones.

    BLOOM's and MPT's attention does not say that it is causal.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = model.config.model_type
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def tags_tokens(model: Any) -> bool:
    """Token classification: a label and an output for each token."""
    return is_named(model, "ForTokenClassification")


def answers_spans(model: Any) -> bool:
    """Question answering: two numbers for each token, of an answer that begins and of one that ends there."""
    return {"start_positions", "end_positions"} <= forward_parameters(model)


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
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        raise TypeError(f"{name} has no table of token embeddings, so it cannot use a prompt") from None
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
    if is_named(model, UNSUPPORTED_HEADS) or UNSUPPORTED_ARGUMENTS & forward_parameters(model):
        raise TypeError(f"{name} reads or pools positions that a prompt would displace; this head is not supported")
    if is_encoder_decoder(model) and (classifies_rows(model) or answers_spans(model)):
        raise TypeError(
            f"{name} gives its decoder the token ids of its input, and a soft prompt has none; use an encoder or a "
            "decoder with this head"
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
    classifies_rows: bool
    pools_last_token: bool
    tags_tokens: bool
    answers_spans: bool
    context_length: int | None

    @classmethod
    def of(cls, model: Any) -> ForwardTraits:
        return cls(
            parameters=frozenset(forward_parameters(model)),
            any_keyword=accepts_any_keyword(model),
            encoder_decoder=is_encoder_decoder(model),
            causal=is_causal(model),
            classifies_rows=classifies_rows(model),
            pools_last_token=pools_last_token(model),
            tags_tokens=tags_tokens(model),
            answers_spans=answers_spans(model),
            context_length=context_length(model),
        )

    @property
    def predicts_next_token(self) -> bool:
        return self.causal and not self.has_task_head

    @property
    def has_task_head(self) -> bool:
        """Whether the model classifies rows or tokens, or answers questions."""
        return self.classifies_rows or self.tags_tokens or self.answers_spans

    @property
    def labels_per_token(self) -> bool:
        """Whether there is one label, and one output, per input token."""
        return not self.encoder_decoder and not self.classifies_rows


def peft_config(model: Any) -> dict[str, Any]:
    """The model's fields of PEFT's ``adapter_config.json``."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if is_encoder_decoder(model):
        task = "SEQ_2_SEQ_LM"
    elif classifies_rows(model):
        task = "SEQ_CLS"
    elif tags_tokens(model):
        task = "TOKEN_CLS"
    elif answers_spans(model):
        task = "QUESTION_ANS"
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


@contextmanager
def with_pad_token(config: Any) -> Iterator[None]:
    """Names a padding token while a decoder classifies rows, if its configuration names none.

    transformers then refuses batches. With vectors as input it never reads which token it is.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "pad_token_id", None) is not None:
        yield
        return
    config.pad_token_id = 0
    try:
        yield
    finally:
        config.pad_token_id = None


KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
"""Types of PEFT's prompts that add no columns to a model's results."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(model: Any, *, task_head: bool = False) -> None:
    """Checks by class and configuration whether a model can run the packed layout.

    Args:
        task_head: for a model that classifies rows, tags tokens or answers questions, not a language model.

    Raises:
        Unsupported: it cannot; with the reason.
    """
    if is_encoder_decoder(model) or not is_causal(model):
        raise Unsupported("only causal decoders can share a prompt's hidden states")
    model = _unadapted(model)
    if task_head and not is_named(model, TASK_HEADS):
        raise Unsupported(f"{type(model).__name__} is not one of transformers' models with a task head")
    if not task_head and model.get_output_embeddings() is None:
        raise Unsupported(f"{type(model).__name__} has no language-modelling head")
    if not task_head and not is_named(model, CAUSAL_HEADS):
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
    if not task_head and getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        raise Unsupported(f"its loss is {model.loss_type}")


def check_no_input_prompt(model: Any) -> None:
    """Raises TypeError if a prompt of PEFT in front of a model's input moves the places of its results.

    An encoder-decoder's decoder and a classification of rows have the same places with such a prompt.
    """
    if is_encoder_decoder(model) or classifies_rows(model):
        return
    configs, active = getattr(model, "peft_config", None) or {}, getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return
    kind = config.peft_type.value
    if kind not in KEYS_AND_VALUES:
        raise TypeError(
            f"{type(model).__name__} cannot use a prompt: it has one of its own, {active!r} ({kind}). "
            "Pass the model without it (`get_base_model()`) and add the saved prompt by its folder, or let "
            "`softprompt_fast.accelerate` run the model as it is"
        )


def _unadapted(model: Any) -> Any:
    """The model to run packed batches with: adapters inside its layers (LoRA) run, prompts of PEFT would not."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise Unsupported(f"it has a prompt of PEFT, {name!r}, which the packed layout does not run")
    return without_adapters(model)
