"""Text generation through transformers' own ``generate``, which sees the ids of texts and nothing else.

Prompts are in the cache (``compiled/continuation.py``) or enter with the first call of the model
(:func:`generate_with_prompt_vectors`). So lengths, penalties, n-grams, stopping and speculative decoding work on the
text, as for the plain model.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .architecture import first_position, forward_parameters, is_named

TOKENIZER_KEYS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")
"""What tokenizers return beside ids and mask; nothing of it has an effect on generated text."""
REFUSED_ARGUMENTS = {
    "inputs_embeds": "the prompt is put in front of the embeddings of `input_ids` here",
    "position_ids": "positions follow from the attention mask and the prompts' lengths",
    "past_key_values": "the cache begins with the prompts",
    "cache_params": "the cache begins with the prompts",
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
    "encoder_repetition_penalty": lambda value: value not in (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": bool,
    "prompt_lookup_num_tokens": lambda value: value is not None,
    "assistant_early_exit": lambda value: value is not None,
    "assistant_model": lambda value: value is not None,
    "guidance_scale": lambda value: value not in (None, 1, 1.0),
}
"""The same for encoder-decoders: transformers reads the encoder's ids, and the encoder gets vectors."""
INDEPENDENT_OF_PADDING = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams", "num_return_sequences", "length_penalty"),
    *("early_stopping", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "repetition_penalty"),
    *(
        "encoder_repetition_penalty",
        "renormalize_logits",
        "remove_invalid_values",
        "suppress_tokens",
        "pad_token_id",
        "bos_token_id",
    ),
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
PER_ROW = ("negative_prompt_ids", "negative_prompt_attention_mask")
PERMUTATIONS = ("perm_mask", "target_mapping")
SPECULATIVE = ("prompt_lookup_num_tokens", "assistant_model")
NEUTRAL = (None, False, 0, 1.0)

Run = Callable[[list[int], Tensor, Tensor, dict[str, Any]], Any]
"""Runs ``generate`` for some rows: their places in the batch, ids, mask (padding on the left) and options."""


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
    """The options without what a tokenizer returns.

    Raises:
        ValueError: an option that cannot be combined with prompts, by name.
    """
    options = {k: v for k, v in options.items() if k not in TOKENIZER_KEYS}
    for name, reason in REFUSED_ARGUMENTS.items():
        if options.pop(name, None) is not None:
            raise ValueError(f"`{name}` cannot be given: {reason}")
    for name, refuses in (REFUSED_OPTIONS | (further or {})).items():
        value = setting(model, options, name)
        if refuses(value):
            raise ValueError(f"`{name}`={value!r} cannot be combined with soft prompts")
    if isinstance(options.get("custom_generate"), str):
        raise ValueError(f"`custom_generate`={options['custom_generate']!r} cannot be combined with soft prompts")
    options.pop("cache_implementation", None)  # "dynamic"; transformers takes no name together with a cache
    in_config = getattr(options.get("generation_config"), "cache_implementation", None) is not None
    return with_settings(options, cache_implementation=None) if in_config else options


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
        ValueError: none or both are given, another shape, a mask that is not 1 and 0, or a token unknown to the model.
    """
    if (input_ids is None) == (inputs is None):
        raise ValueError(
            "give `input_ids` or `inputs`, not both" if inputs is not None else "`input_ids` must be given"
        )
    ids = input_ids if input_ids is not None else inputs
    assert ids is not None
    if ids.dim() != 2:
        raise ValueError(f"`input_ids` must be [B, T], got {list(ids.shape)}")
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    elif attention_mask.shape != ids.shape:
        shapes = f"{list(ids.shape)}, got {list(attention_mask.shape)}"
        raise ValueError(f"`attention_mask` must have the shape of input_ids {shapes}")
    else:
        real = attention_mask != 0
        if not (real == attention_mask).all():
            raise ValueError(
                f"`attention_mask` must be 1 and 0, got {attention_mask[real != attention_mask][0].item()}"
            )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    unknown = ids[real & ((ids < 0) | (ids >= vocabulary))]
    if unknown.numel():
        raise ValueError(f"`input_ids` must be 0 to {vocabulary - 1}, got {unknown[0].item()}")
    return ids, real.long()


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


def generate_rows(
    model: Any, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any], keys: Sequence[Hashable], run: Run
) -> Any:
    """Runs rows in groups and puts the results together.

    Args:
        input_ids, attention_mask: [B, T], padding anywhere.
        keys: rows of one key run together. Padding holds the row's own first token, so that a penalty on repeated
            tokens affects no token that the row does not contain.

    Returns:
        ``input_ids`` followed by the new tokens. With ``return_dict_in_generate`` the output of ``generate``; if there
        are several groups, only its sequences, scores and logits.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if not groups:
        return input_ids
    if len(groups) > 1 and options.get("streamer") is not None:
        raise ValueError("`streamer` cannot be combined with rows of several prompts or lengths; give one row")
    mask = (attention_mask != 0).long()
    order = mask.argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    outputs, widths = [], []
    for rows in groups.values():
        index = torch.tensor(rows, device=ids.device)
        own = mask[index]
        width = int(own.sum(1).max()) if own.shape[1] else 0
        own, texts = own[:, own.shape[1] - width :], ids[index, ids.shape[1] - width :]
        if width:
            texts = torch.where(own == 1, texts, texts.gather(1, own.argmax(1, keepdim=True)))
        outputs.append(run(rows, texts, own, _of_rows(options, rows, len(ids))))
        widths.append(width)
    return _joined(model, input_ids, list(groups.values()), widths, outputs, options)


def _of_rows(options: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The options for some of a batch's rows."""
    options = dict(options)
    if rows == list(range(count)):
        return options
    for name in PER_ROW:
        if options.get(name) is not None:
            options[name] = options[name][torch.tensor(rows, device=options[name].device)]
    allowed = options.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return options


def _joined(
    model: Any,
    input_ids: Tensor,
    groups: list[list[int]],
    widths: list[int],
    outputs: list[Any],
    options: dict[str, Any],
) -> Any:
    """One result for all groups; see :func:`generate_rows`."""
    plain = isinstance(outputs[0], Tensor)
    sequences = [output if plain else output.sequences for output in outputs]
    new = [rows[:, width:] for rows, width in zip(sequences, widths, strict=True)]
    pad = setting(model, options, "pad_token_id")
    if pad is None:
        end = setting(model, options, "eos_token_id")
        pad = 0 if end is None else end if isinstance(end, int) else end[0]
    copies = new[0].shape[0] // len(groups[0])
    whole = torch.cat([input_ids.repeat_interleave(copies, 0), _scattered(new, groups, int(pad)).to(input_ids)], 1)
    if plain:
        return whole
    output = outputs[0]
    output.sequences = whole
    if len(groups) > 1:
        for name in output.keys() - {"sequences"}:
            parts = [getattr(each, name) for each in outputs]
            if name == "sequences_scores":
                output[name] = _scattered(parts, groups, 0)
            elif name in ("scores", "logits"):
                steps = range(max(len(part) for part in parts))
                output[name] = tuple(
                    _scattered([part[min(step, len(part) - 1)] for part in parts], groups, 0) for step in steps
                )
            else:
                output[name] = None
    return output


def _scattered(parts: list[Tensor], groups: list[list[int]], fill: int) -> Tensor:
    """Each group's lines at the places of its rows in the batch; shorter lines end with `fill`."""
    copies = parts[0].shape[0] // len(groups[0])
    total = sum(map(len, groups)) * copies
    width = [max(part.shape[1] for part in parts)] if parts[0].dim() > 1 else []
    whole = parts[0].new_full((total, *width), fill)
    for part, rows in zip(parts, groups, strict=True):
        places = torch.tensor([row * copies + i for row in rows for i in range(copies)], device=part.device)
        if width:
            whole[places, : part.shape[1]] = part
        else:
            whole[places] = part
    return whole


class _PromptInFront:
    """A hook before a model's forward: the call that brings a text's first token gets the prompt's vectors too.

    ``generate`` of transformers calls the model with ids of the text. In the first call they become vectors with the
    prompt in front. A model that is given its whole text in every call, one token longer each time, gets the prompt in
    every call. Other calls continue the cache; their positions and mask are moved by the prompt's length.

    Args:
        embed: ids [N, T] to vectors [N, P + T, D].
        length: P
        first: the number of a row's first position; transformers' ``generate`` begins with 0 for every model.
        continues: calls after the first bring the tokens that the cache does not hold yet.
        speculative: calls may bring any number of tokens.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], length: int, *, first: int, continues: bool, speculative: bool
    ) -> None:
        self.embed, self.length, self.first = embed, length, first
        self.continues, self.speculative = continues, speculative
        self.width: int | None = None
        self.thread = threading.get_ident()

    def __call__(self, module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        ids = keywords.get("input_ids")
        if ids is None or threading.get_ident() != self.thread:
            return None
        keywords = dict(keywords)
        whole = self.width is None
        if self.width is not None and not self.speculative and ids.shape[1] == self.width + 1:
            whole = self.width > 0 or not self.continues  # one token after none may be either
        mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
        if mask is not None and mask.dim() == 2:
            keywords["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        if positions is not None:
            positions = positions + self.length
            if whole:
                ahead = torch.arange(self.length, device=positions.device).expand(*positions.shape[:-1], self.length)
                positions = torch.cat([ahead.to(positions), positions], -1)
            positions = positions + self.first
            # After a prompt without a text transformers has no last position to continue from; the cache knows it.
            keywords["position_ids"] = positions if whole or positions.shape[-1] == ids.shape[1] else None
        if whole:
            self.width = ids.shape[1]
            for name, value in keywords.items():  # token types, languages
                if name not in ("input_ids", "attention_mask", "position_ids") and _per_token(value, ids):
                    keywords[name] = torch.cat([value[:, :1].expand(-1, self.length), value], 1)
            for name in PERMUTATIONS:
                if keywords.get(name) is not None:
                    keywords[name] = self._widened(keywords[name], ids.shape[1])
            keywords["inputs_embeds"] = self.embed(ids)
            keywords["input_ids"] = None
        return args, keywords

    def _widened(self, value: Tensor, width: int) -> Tensor:
        """XLNet's masks: [N, T, T] with equal lines, or [N, 1, T]."""
        value = F.pad(value, (self.length, 0))
        return torch.cat([value[:, :1].expand(-1, self.length, -1), value], 1) if value.shape[1] == width > 1 else value


def _per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def _reads_new_tokens_only(model: Any, input_ids: Tensor) -> bool:
    """Whether a step of ``generate`` passes the model the tokens that its cache does not hold yet."""
    two = input_ids.new_ones(len(input_ids), 2)
    width: int = model.prepare_inputs_for_generation(two, next_sequence_length=1)["input_ids"].shape[1]
    return width == 1


def generate_with_prompt_vectors(
    model: Any, input_ids: Tensor, embed: Callable[[Tensor], Tensor], length: int, options: dict[str, Any]
) -> Any:
    """``model.generate`` of rows [B, T] without padding after one prompt of `length` vectors, for any decoder.

    Args:
        embed: ids [N, T] to vectors [N, length + T, D], the prompt in front.
    """
    inputs = {"attention_mask": torch.ones_like(input_ids)} if "attention_mask" in forward_parameters(model) else {}
    speculative = any(setting(model, options, name) is not None for name in SPECULATIVE)
    continues = setting(model, options, "use_cache") is not False and _reads_new_tokens_only(model, input_ids)
    if speculative and not continues:
        reason = "it reads its whole text again in every step"
        raise ValueError(f"speculative decoding cannot be combined with {type(model).__name__}: {reason}")
    first = first_position(model)
    prompt = _PromptInFront(embed, length, first=first, continues=continues, speculative=speculative)
    hook = model.register_forward_pre_hook(prompt, with_kwargs=True)
    try:
        return model.generate(input_ids=input_ids, **inputs, **options)
    finally:
        hook.remove()
