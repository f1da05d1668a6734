"""Initial values of a soft prompt: float32 ``[P, D]``, as the model sees them, its embedding scale included."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..hf.embedding import EmbeddingTable
from ..tasks.encoding import token_ids
from .vector_files import read_vectors

INITIALIZATIONS = ("random", "vocabulary", "text", "class_labels")
COMMON_TOKENS = 5000
"""Lester et al. 2021 (arXiv 2104.08691, section 3.2) sample from the 5,000 most common tokens; tokenizers number
tokens roughly by frequency."""


class InitOptions(TypedDict, total=False):
    """The keywords of every ``add_prompt`` that say how initial values are made; see :func:`initial_prompt`."""

    tokenizer: Any
    """A tokenizer of transformers; needed by "text" and "class_labels"."""
    init_text: str | None
    """The text of "text"."""
    class_labels: Sequence[str] | None
    """The labels of "class_labels"."""
    seed: int | None
    """Seed of random draws; None: torch's global generator."""


def initial_prompt(
    init: str | Tensor | PathLike[str],
    num_virtual_tokens: int | None,
    table: EmbeddingTable | None,
    *,
    tokenizer: Any = None,
    init_text: str | None = None,
    class_labels: Sequence[str] | None = None,
    seed: int | None = None,
) -> Tensor:
    """The initial values of a prompt.

    Args:
        init: one of:

            * "random": normal, with the standard deviation of the embedding's entries.
            * "vocabulary": vectors of tokens drawn without replacement from the first 5,000.
            * "text": the tokens of ``init_text``, repeated or cut to length.
            * "class_labels": one vector per label, the mean of its tokens; more vectors are drawn as by "vocabulary".
            * a tensor [P, D], or the path of a PEFT prompt folder, of a safetensors or ``.npy`` file or of a soft
              prompt of KoboldAI. Task 2 of a PEFT folder with several is ``folder#2``.
        num_virtual_tokens: P. None: as many as "text", "class_labels", the tensor or the file gives.
        table: the model's embedding table; needed unless ``init`` is a tensor or a path.
        tokenizer, init_text, class_labels, seed: see :class:`InitOptions`.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if num_virtual_tokens is not None and (not isinstance(num_virtual_tokens, int) or num_virtual_tokens < 1):
        raise ValueError(f"`num_virtual_tokens` must be a positive integer, got {num_virtual_tokens!r}")
    if isinstance(init, Tensor):
        return _as_given(init, num_virtual_tokens)
    if not isinstance(init, str) or init not in INITIALIZATIONS:
        return _as_given(read_vectors(init), num_virtual_tokens)
    if table is None:
        raise ValueError(f"`embedding` must be given for init={init!r}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if init in ("text", "class_labels") and tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for init={init!r}")
    if init == "text":
        ids = _tokens(tokenizer, init_text, "init_text")
        count = num_virtual_tokens or len(ids)
        ids = (ids * -(-count // len(ids)))[:count]
        return _look_up(table, torch.tensor(ids))
    if init == "class_labels":
        if not class_labels:
            raise ValueError(f"`class_labels` must name the labels for init='class_labels', got {class_labels!r}")
        rows = [
            _look_up(table, torch.tensor(_tokens(tokenizer, label, "class_labels"))).mean(0) for label in class_labels
        ]
        count = num_virtual_tokens or len(rows)
        given = torch.stack(rows[:count])
        return torch.cat([given, _vocabulary(table, count - len(given), generator)])
    if num_virtual_tokens is None:
        raise ValueError(f"`num_virtual_tokens` must be given for init={init!r}")
    if init == "vocabulary":
        return _vocabulary(table, num_virtual_tokens, generator)
    spread = table.weight.detach().float().std().item() * abs(table.scale)
    return torch.randn(num_virtual_tokens, table.weight.shape[1], generator=generator, dtype=torch.float32) * spread


def _as_given(values: Tensor, count: int | None) -> Tensor:
    if values.dim() != 2 or not values.is_floating_point() or len(values) == 0:
        raise ValueError(f"`init` must be a float tensor [P, D] with P > 0, got {values.dtype} {list(values.shape)}")
    if count is not None and count != len(values):
        raise ValueError(f"`num_virtual_tokens` must be {len(values)}, as many as `init` has, or None, got {count}")
    if not torch.isfinite(values).all():
        raise ValueError("`init` must be finite, got NaN or infinity")
    return values.detach().to(torch.float32).clone()


def _look_up(table: EmbeddingTable, ids: Tensor) -> Tensor:
    return table(ids.to(table.weight.device)).detach().to(device="cpu", dtype=torch.float32)


def _vocabulary(table: EmbeddingTable, count: int, generator: torch.Generator | None) -> Tensor:
    common = min(COMMON_TOKENS, table.weight.shape[0])
    if count > common:
        raise ValueError(f"`num_virtual_tokens` must be at most {common} for init='vocabulary', got {count}")
    return _look_up(table, torch.randperm(common, generator=generator)[:count])


def _tokens(tokenizer: Any, text: str | None, argument: str) -> list[int]:
    ids = token_ids(tokenizer, text) if isinstance(text, str) else []
    if not ids:
        raise ValueError(f"`{argument}` must hold text of at least one token, got {text!r}")
    return list(ids)
