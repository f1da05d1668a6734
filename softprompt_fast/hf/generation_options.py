"""Options and rows of transformers' ``generate`` with prompts: which are refused, and which depend on padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .architecture import forward_parameters, is_named
from .embedding import vocabulary_size

TOKENIZER_KEYS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")
"""What tokenizers return beside ids and mask. Only token types can have an effect on text: :func:`effective_types`."""
TOKEN_TYPES = "token_type_ids"
REFUSED_ARGUMENTS = {
    "inputs_embeds": "the prompt is put in front of the embeddings of `input_ids` here",
    "position_ids": "positions follow from the attention mask and the prompts' lengths",
    "past_key_values": "the cache begins with the prompts",
    "cache": "the cache begins with the prompts",
    "cache_params": "the cache begins with the prompts",
    "encoder_outputs": "the encoder runs with the prompts",
    "adapter_names": "all rows of a batch run with the active adapter; `set_adapter` chooses it",
    "decoder_inputs_embeds": "transformers' `generate` takes `decoder_input_ids` only",
}
"""Arguments of transformers' ``generate`` that cannot be given here, and why."""
REFUSED_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "cache_implementation": lambda value: value not in (None, "dynamic", "hybrid"),
    "token_healing": bool,
    "use_mtp": bool,
    "is_assistant": bool,
    "penalty_alpha": bool,
    "dola_layers": lambda value: value is not None,
    "constraints": bool,
    "force_words_ids": bool,
    "num_beam_groups": lambda value: value not in (None, 1),
    "assistant_ensemble_weight": lambda value: value is not None,
}
"""Fields of GenerationConfig that cannot be combined with prompts, and which values are meant."""
REFUSED_WITH_VECTORS: dict[str, Callable[[Any], bool]] = {
    "guidance_scale": lambda value: value not in (None, 1, 1.0),
    "assistant_early_exit": lambda value: value is not None,
}
"""The same, where the prompt enters as vectors: they run the model on a text of their own."""
REFUSED_WITH_ENCODER: dict[str, Callable[[Any], bool]] = {
    "prefill_chunk_size": lambda value: value is not None,
    "encoder_repetition_penalty": lambda value: value not in (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": bool,
    "prompt_lookup_num_tokens": lambda value: value is not None,
    "assistant_early_exit": lambda value: value is not None,
    "assistant_model": lambda value: value is not None,
    "guidance_scale": lambda value: value not in (None, 1, 1.0),
}
"""The same for encoder-decoders: transformers reads the encoder's ids, and the encoder gets vectors.

Chunks of the decoder's ids would cut the encoder's mask.
"""
INDEPENDENT_OF_PADDING = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams", "num_return_sequences", "length_penalty"),
    *("early_stopping", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "repetition_penalty"),
    *("encoder_repetition_penalty", "renormalize_logits", "remove_invalid_values", "suppress_tokens"),
    *("pad_token_id", "bos_token_id"),
    *("eos_token_id", "decoder_start_token_id", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate", "compile_config", "disable_compile", "low_memory", "max_time"),
    *("transformers_version", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "streamer", "tokenizer"),
    *("synced_gpus", "generation_config", "prefill_chunk_size", "exponential_decay_length_penalty"),
    *("continuous_batching_config", "use_model_defaults", "trust_remote_code", "diversity_penalty"),
}
"""Options whose effect on a row does not depend on padding before its text. With others, padded rows run apart."""
WRONG_CACHE = "ProphetNetForConditionalGeneration"
"""An encoder-decoder whose steps on a cache give other logits than its forward: it generates without one."""
NEUTRAL = (None, False, 0, 1.0)


def setting(model: Any, options: dict[str, Any], name: str) -> Any:
    """The value of an option: the argument's, else the generation configuration's, else the model's own."""
    for value in (
        options.get(name),
        getattr(options.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    ):
        if value is not None:
            return value
    return None


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Every option that the caller gave, by arguments or in a generation configuration."""
    fields = vars(options["generation_config"]) if options.get("generation_config") is not None else {}
    every = fields | {k: v for k, v in options.items() if v is not None}
    return {k: v for k, v in every.items() if v is not None and not k.startswith("_")}


def with_settings(options: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The options with further settings: in the caller's generation configuration if there is one, else as arguments.

    transformers is about to refuse a generation configuration together with arguments.
    """
    config = options.get("generation_config")
    if config is None:
        return options | values
    config = copy.copy(config)
    for name, value in values.items():
        setattr(config, name, value)
    return {k: v for k, v in options.items() if k not in values} | {"generation_config": config}


def checked_options(
    model: Any, options: dict[str, Any], further: dict[str, Callable[[Any], bool]] | None = None
) -> dict[str, Any]:
    """The options without what a tokenizer returns, but for token types that have an effect.

    Raises:
        TypeError: an option of another type.
        ValueError: an option that cannot be combined with prompts, by name.
    """
    types = effective_types(model, options)
    options = {k: v for k, v in options.items() if k not in TOKENIZER_KEYS}
    if types is not None:
        options[TOKEN_TYPES] = types
    config, assistant = options.get("generation_config"), options.get("assistant_model")
    if config is not None and not hasattr(config, "to_diff_dict"):
        raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(config).__name__}")
    if assistant is not None and not hasattr(assistant, "prepare_inputs_for_generation"):
        raise TypeError(f"`assistant_model` must be a model of transformers, got {type(assistant).__name__}")
    for name, reason in REFUSED_ARGUMENTS.items():
        if options.pop(name, None) is not None:
            raise ValueError(f"`{name}` cannot be given: {reason}")
    for name, refuses in (REFUSED_OPTIONS | (further or {})).items():
        value = setting(model, options, name)
        if refuses(value):
            shown = type(value).__name__ if isinstance(value, (torch.nn.Module, Tensor)) else repr(value)
            raise ValueError(f"`{name}`={shown} cannot be combined with soft prompts")
    if isinstance(options.get("custom_generate"), str):
        raise ValueError(f"`custom_generate`={options['custom_generate']!r} cannot be combined with soft prompts")
    options.pop("cache_implementation", None)  # "dynamic"; transformers takes no name together with a cache
    in_config = getattr(options.get("generation_config"), "cache_implementation", None) is not None
    return with_settings(options, cache_implementation=None) if in_config else options


def effective_types(model: Any, options: dict[str, Any]) -> Tensor | None:
    """The token types [B, T] among the options, if the model's numbers depend on them.

    Types of zeros are what most models read if none are given. GPT-2 and its kin then add nothing.
    """
    types: Tensor | None = options.get(TOKEN_TYPES)
    if types is None or TOKEN_TYPES not in forward_parameters(model):
        return None
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", None)
    return None if kinds == 0 or (kinds is not None and not types.any()) else types


def encoder_decoder_options(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The checked options of an encoder-decoder.

    Raises:
        ValueError: an option that cannot be combined with prompts, by name.
    """
    options = checked_options(model, options, REFUSED_WITH_ENCODER)
    return with_settings(options, use_cache=False) if is_named(model, WRONG_CACHE) else options


def checked_rows(
    model: Any, input_ids: Tensor | None, inputs: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``input_ids`` [B, T], which may be given as ``inputs``, and the mask [B, T]; 1: a token.

    Raises:
        TypeError: no tensor of integers.
        ValueError: none or both are given, another shape, a mask that is not 1 and 0, or a token unknown to the model.
    """
    if (input_ids is None) == (inputs is None):
        raise ValueError(
            "give `input_ids` or `inputs`, not both" if inputs is not None else "`input_ids` must be given"
        )
    ids: Any = input_ids if input_ids is not None else inputs
    if not isinstance(ids, Tensor):
        hint = "; pass a mapping as keywords, `**batch`" if hasattr(ids, "keys") else ""
        raise TypeError(f"`input_ids` must be a tensor [B, T], got {type(ids).__name__}{hint}")
    if ids.is_floating_point():
        raise TypeError(f"`input_ids` must be int64 or int32, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.dim() != 2:
        raise ValueError(f"`input_ids` must be [B, T], got {list(ids.shape)}")
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    elif not isinstance(attention_mask, Tensor):
        kind = type(attention_mask).__name__
        raise TypeError(f"`attention_mask` must be a tensor or None, got {kind}; give other arguments by name")
    elif attention_mask.shape != ids.shape:
        shapes = f"{list(ids.shape)}, got {list(attention_mask.shape)}"
        raise ValueError(f"`attention_mask` must have the shape of input_ids {shapes}")
    else:
        real = attention_mask != 0
        if not (real == attention_mask).all():
            raise ValueError(
                f"`attention_mask` must be 1 and 0, got {attention_mask[real != attention_mask][0].item()}"
            )
    vocabulary = vocabulary_size(model.get_input_embeddings())
    unknown = ids[real & ((ids < 0) | (ids >= vocabulary))]
    if unknown.numel():
        raise ValueError(f"`input_ids` must be 0 to {vocabulary - 1}, got {unknown[0].item()}")
    return ids, real.long()


def check_begins(virtual: Sequence[int], tokens: Sequence[int]) -> None:
    """Checks that every row begins with something.

    Args:
        virtual, tokens: [B], virtual tokens of each row's prompt and tokens of its text.

    Raises:
        ValueError: with the first row that has neither.
    """
    for row, (prompt, text) in enumerate(zip(virtual, tokens, strict=True)):
        if not prompt and not text:
            raise ValueError(f"`input_ids` must hold a token in each row without a prompt, got none in row {row}")


def end_token_ids(model: Any, token: int | None) -> list[int] | None:
    """The tokens at which text ends: the model's own, and `token`, with which answers end in training."""
    own = model.generation_config.eos_token_id
    ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    if token is not None and token not in ids:
        ids.append(token)
    return ids or None


def with_end_token(model: Any, token: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the end of text as it was trained, if the caller has not given one."""
    ends = end_token_ids(model, token)
    if ends is None or given(options).get("eos_token_id") is not None:
        return options
    return with_settings(options, eos_token_id=ends)


def depends_on_padding(model: Any, options: dict[str, Any]) -> bool:
    """Whether padding before a row's text could change its new tokens: then only rows of one length run together."""
    every = {k: v for k, v in vars(model.generation_config).items() if v is not None and not k.startswith("_")}
    every |= given(options)
    if every.get("max_new_tokens") is not None:
        every.pop("max_length", None)
    if every.get("min_new_tokens") is not None:
        every.pop("min_length", None)
    return any(k not in INDEPENDENT_OF_PADDING and not _neutral(v) for k, v in every.items())


def _neutral(value: Any) -> bool:
    return isinstance(value, (int, float, type(None))) and value in NEUTRAL
