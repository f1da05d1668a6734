"""Checks the arguments of a call, and drops the keys that tokenizers return and a model does not take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.architecture import ForwardTraits
from ..hf.embedding import check_whole, looked_up, own_embedding
from .spans import check_positions

logger = logging.getLogger("softprompt_fast")

TOKENIZER_KEYS = {
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "num_truncated_tokens",
    "length",
}
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
MODEL_KEYWORDS = {"num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits"}
"""Keywords that a forward with ``**kwargs`` understands without naming them."""


@dataclass(frozen=True)
class Texts:
    """The texts of a batch."""

    input_ids: Tensor
    """[B, T]; places in `embedding` if vectors were given."""
    attention_mask: Tensor | None
    embedding: Any
    """The module or table [V, D] that gives the tokens' vectors."""


def texts_of(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None = None,
    token_types: Tensor | None = None,
) -> Texts:
    """The texts of a call by ids [B, T] or by vectors [B, T, D].

    Raises:
        TypeError, ValueError: both or neither are given, or a shape is wrong; with the argument, the rule, the value.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if inputs_embeds is not None else "neither"
        raise ValueError(f"give `input_ids` or `inputs_embeds`, got {given}")
    embedding = model.get_input_embeddings()
    if input_ids is not None:
        _check_tensor("input_ids", input_ids, "[B, T]", 2)
        check_whole(model)
        input_ids, embedding = looked_up(embedding, input_ids)
    if inputs_embeds is not None:
        width = own_embedding(embedding).weight.shape[1]
        _check_tensor("inputs_embeds", inputs_embeds, f"[B, T, {width}]", 3)
        if inputs_embeds.shape[2] != width:
            raise ValueError(f"`inputs_embeds` must have shape [B, T, {width}], got {list(inputs_embeds.shape)}")
        embedding = inputs_embeds.flatten(0, 1)
        input_ids = torch.arange(len(embedding), device=embedding.device).view(inputs_embeds.shape[:2])
    assert input_ids is not None
    for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_types)):
        if value is not None:
            _check_like(name, value, input_ids.shape)
    return Texts(input_ids, attention_mask, embedding)


def check_labels(labels: Tensor | None, shape: Sequence[int], traits: ForwardTraits, options: dict[str, Any]) -> None:
    """Checks the shape of labels for texts [B, T], and that an encoder-decoder's decoder has something to read."""
    if traits.answers_spans:
        check_positions(options, shape[0])
        if labels is not None:
            raise ValueError("`labels` cannot be given for question answering: give `start_positions`, `end_positions`")
    if labels is None:
        if traits.encoder_decoder and not any(name in options for name in DECODER_INPUTS):
            raise ValueError("`labels` or `decoder_input_ids` must be given because the decoder reads them")
        return
    if traits.labels_per_token:
        _check_like("labels", labels, shape)
    elif traits.encoder_decoder:
        _check_tensor("labels", labels, "[B, T']", 2)
    if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[0] != shape[0]:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"`labels` must have {shape[0]} rows like the texts, got {got}")


def known_options(
    options: dict[str, Any], traits: ForwardTraits, reported: set[str], own: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The options that a model's forward takes. An unknown one gets one log line, and never reaches attention.

    Args:
        reported: unknown keys that have had their line; added to.
        own: further keys that are taken.
    """
    taken = traits.parameters | own | (MODEL_KEYWORDS if traits.any_keyword else frozenset())
    for key in options.keys() - taken - TOKENIZER_KEYS - reported:
        reported.add(key)
        logger.warning("`%s` is dropped: the model's forward does not take it", key)
    return {key: value for key, value in options.items() if key in taken and value is not None}


def report_first_labels(options: dict[str, Any], reported: set[str]) -> None:
    """One log line if the caller computes a loss from logits, as Trainer does for label smoothing.

    Args:
        reported: what has had its line; added to.
    """
    if options.get("num_items_in_batch") is not None and "loss of logits" not in reported:
        reported.add("loss of logits")
        logger.warning(
            "a loss is computed from logits, and none of them predicts a row's first token: mask first tokens' labels"
        )


def kept_columns(logits_to_keep: int | Tensor, tokens: int) -> slice | Tensor:
    """The columns of logits [B, T, V] to return: the last ones (0: all), or those at these positions.

    Raises:
        ValueError: a negative number, or a position that is not one of a text's.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.is_floating_point():
            shape = list(logits_to_keep.shape)
            raise ValueError(f"`logits_to_keep` must be an int or positions [M], got {logits_to_keep.dtype} {shape}")
        if len(logits_to_keep) and not -tokens <= int(logits_to_keep.min()) <= int(logits_to_keep.max()) < tokens:
            raise ValueError(f"`logits_to_keep` must be 0 to {tokens - 1}, got {logits_to_keep.tolist()}")
        return logits_to_keep
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"`logits_to_keep` must be at least 0, got {logits_to_keep!r}")
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _check_tensor(name: str, value: object, shape: str, dimensions: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor {shape}, got {type(value).__name__}")
    if value.dim() != dimensions:
        raise ValueError(f"`{name}` must have shape {shape}, got {list(value.shape)}")


def _check_like(name: str, value: object, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor or None, got {type(value).__name__}")
    if value.shape != torch.Size(shape):
        raise ValueError(f"`{name}` must have the shape of input_ids {list(shape)}, got {list(value.shape)}")
