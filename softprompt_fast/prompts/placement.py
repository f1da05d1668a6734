"""Prompts whose first positions are not trained.

* A prompt after the beginning-of-sequence token: ``[BOS][prompt][text]`` instead of ``[prompt][BOS][text]``. The first
  vector is BOS's embedding; texts are tokenised without special tokens (``Task.special_tokens = False``). Everything
  else sees an ordinary prompt of P + 1 vectors.
* A deep prompt whose first positions stay attention sinks, as in PEFT's cartridges (arXiv 2506.06266).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..hf.embedding import token_vectors, vectors_like
from .parameter_names import PARAMETER_PREFIX

if TYPE_CHECKING:
    from .fast_soft_prompt import FastSoftPrompt

FORMS = f"parametrizations.{PARAMETER_PREFIX}"
ORIGINAL, FIXED = ".original", ".0.vector"
"""``state_dict`` holds a prompt whose first rows are fixed under two names: FORMS, its name, and one of these."""


class FixedFirst(nn.Module):
    """A parametrization (``torch.nn.utils.parametrize``) that keeps a prompt's first vectors as they are.

    An optimiser sees a zero gradient there. Weight decay changes only numbers that nothing reads.

    ::

        bos = bos_vector(model, tokenizer)
        tuned.add_prompt("movies", init=torch.cat([bos[None], values]))  # [P + 1, D]
        parametrize.register_parametrization(tuned.prompts, "prompt_movies", FixedFirst(bos))

    Args:
        vector: [D], or [k, D] for the first k.
    """

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        if vector.dim() not in (1, 2):
            raise ValueError(f"`vector` must have shape [D] or [k, D], got {list(vector.shape)}")
        self.vector: Tensor
        self.register_buffer("vector", vector.detach().clone())

    def forward(self, prompt: Tensor) -> Tensor:
        """[P, D] -> the same, its first rows replaced; the gradient of these rows is zero."""
        fixed = torch.atleast_2d(self.vector.to(prompt))
        return torch.cat([fixed, prompt[len(fixed) :]])

    def right_inverse(self, prompt: Tensor) -> Tensor:
        return prompt


def freeze_first(bank: FastSoftPrompt, name: str, count: int) -> nn.Parameter:
    """Excludes a prompt's first positions from training; returns the parameter [P, D] that is trained.

    Args:
        count: 0: all are trained.

    Raises:
        ValueError: more positions than the prompt has.
    """
    parameter = bank[name]
    check_frozen(count, len(parameter))
    if count and frozen_count(bank, name) >= count:  # they are excluded already
        parameter = bank.forms(name).original
    elif count:
        form = FixedFirst(parameter[:count].detach())
        parametrize.register_parametrization(bank, PARAMETER_PREFIX + name, form)
        parameter = bank.forms(name).original
    return parameter


def check_frozen(count: Any, length: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= length:
        raise ValueError(f"`num_frozen_tokens` must be 0 to {length}, the prompt's length, got {count!r}")


def frozen_count(bank: FastSoftPrompt, name: str) -> int:
    """How many of a prompt's first positions are not trained."""
    forms = bank.forms(name)
    fixed = forms is not None and isinstance(forms[-1], FixedFirst)
    return len(torch.atleast_2d(forms[-1].vector)) if fixed else 0


def names_with_frozen(state: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The prompts of a saved bank that are computed by fixing their first rows, and in no other way."""
    entries: dict[str, set[str]] = {}
    for key in state:
        if key.startswith(prefix + FORMS):
            name, dot, entry = key.removeprefix(prefix + FORMS).partition(".")
            entries.setdefault(name, set()).add(dot + entry)
    return [name for name, found in entries.items() if found == {ORIGINAL, FIXED}]


def add_with_frozen(bank: FastSoftPrompt, state: Mapping[str, Any], prefix: str) -> None:
    """Adds the prompts with fixed first rows that a saved bank has and this one lacks; their values are loaded later.

    Args:
        prefix: begins the bank's names in the state.
    """
    for name in names_with_frozen(state, prefix):
        if name not in bank:
            bank.add_prompt(name, init=state[prefix + FORMS + name + ORIGINAL])
            freeze_first(bank, name, len(torch.atleast_2d(state[prefix + FORMS + name + FIXED])))


def bos_vector(model: Any, tokenizer: Any) -> Tensor:
    """[D] float32, the vector that the model sees for the beginning-of-sequence token, its scale included.

    Args:
        model: a transformers model, or a :class:`SoftPromptModel`.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ValueError(
            f"`tokenizer` must have a beginning-of-sequence token, but {type(tokenizer).__name__} has none"
        )
    embedding = model.get_input_embeddings()
    ids = torch.tensor([token], device=vectors_like(embedding).device)
    return token_vectors(embedding, ids)[0].detach().float()
