"""``FastSoftPrompt``: a trainable bank of named soft prompts of any lengths, on top of the fused pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..hf.embedding import embedding_table
from ..ops.assemble.batch import PromptedBatch
from ..ops.assemble.functional import assemble
from .initialization import METHODS, initial_prompt

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
PREFIX = "prompt_"
"""Of the parameters' names, so that no prompt can hide an attribute of the module."""

UPDATE_A, UPDATE_B = "update_a_", "update_b_"
"""Of the names of a token update's factors."""

PromptIds = str | Sequence["str | int | None"] | Tensor | None


@dataclass
class Chosen:
    """The prompts that a batch uses."""

    tensors: list[Tensor]
    """[P_n, D] each, in the order in which rows first use them."""
    ids: list[int]
    """[B]: each row's place in ``tensors``, -1 for none."""
    updates: list[tuple[Tensor, Tensor] | None]
    """The factors a [U_n, r_n] and b [r_n, D] of each prompt's token update, None where it has none."""

    @property
    def offsets(self) -> list[int]:
        return list(accumulate((tensor.shape[0] for tensor in self.tensors), initial=0))

    def joined(self, bank: FastSoftPrompt, device: torch.device) -> Tensor:
        """[R, D]; one prompt is passed on as it is."""
        if len(self.tensors) == 1:
            return self.tensors[0]
        return torch.cat(self.tensors) if self.tensors else torch.empty(0, bank.embedding_dim, device=device)

    def token_factors(self) -> tuple[Tensor, Tensor] | None:
        """a [N, U, r] and b [N, r, D] for ``assemble``, filled up with zeros; None if no prompt has an update."""
        known = [update for update in self.updates if update is not None]
        if not known:
            return None
        reach, rank = max(a.shape[0] for a, _ in known), max(a.shape[1] for a, _ in known)
        nothing = known[0][0].new_zeros(0, 0), known[0][1].new_zeros(0, known[0][1].shape[1])
        pairs = [update or nothing for update in self.updates]
        return (
            torch.stack([F.pad(a, (0, rank - a.shape[1], 0, reach - a.shape[0])) for a, _ in pairs]),
            torch.stack([F.pad(b, (0, 0, 0, rank - b.shape[0])) for _, b in pairs]),
        )


class FastSoftPrompt(nn.Module):
    """A bank of soft prompts, each a parameter ``[P_n, D]`` of its own.

    Works inside anybody's loop: an optimiser sees ordinary parameters, ``state_dict`` holds one entry per prompt, and
    the result of a call goes straight into a transformers model::

        bank = FastSoftPrompt(model.config.hidden_size, {"movies": 20, "tweets": 50})
        batch = bank(input_ids, attention_mask, embedding=model.get_input_embeddings(), prompt_ids=["movies", "tweets"])
        output = model(**batch)

    A prompt may have a token update besides (DePT, arXiv 2309.05173): the vector of its rows' token number t, t < U,
    gets row t of ``update_a_<name> [U, r] @ update_b_<name> [r, D]`` added, in the same pass. See
    :meth:`add_token_update`.

    Args:
        embedding_dim: D, the model's hidden size at its input.
        prompts: names and lengths, filled with normal noise of standard deviation 0.02. Other first values:
            :meth:`add_prompt`.
        padding_side: of the batches it makes, "right" or "left".
        dtype, device: of the parameters. float32 is right for a bfloat16 model too: the cast is part of the pass.
    """

    def __init__(
        self,
        embedding_dim: int,
        prompts: Mapping[str, int] | None = None,
        *,
        padding_side: str = "right",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(embedding_dim, int) or embedding_dim < 1:
            raise ValueError(f"`embedding_dim` must be a positive integer, got {embedding_dim!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {padding_side!r}")
        self.embedding_dim = embedding_dim
        self.padding_side = padding_side
        self._factory = {"dtype": dtype, "device": device}
        self._names: list[str] = []
        for name, length in (prompts or {}).items():
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"`prompts` must give a positive length for {name!r}, got {length!r}")
            self.add_prompt(name, init=torch.randn(length, embedding_dim) * 0.02)

    @classmethod
    def frozen(cls, prompts: Mapping[str, Tensor], like: FastSoftPrompt) -> FastSoftPrompt:
        """A bank of tensors [P, D] that are neither copied nor trained, otherwise like another."""
        bank = cls(like.embedding_dim, padding_side=like.padding_side)
        for name, tensor in prompts.items():
            bank.register_parameter(PREFIX + name, nn.Parameter(tensor, requires_grad=False))
            bank._names.append(name)
        return bank

    # --- the bank ---

    @property
    def names(self) -> list[str]:
        """The prompts' names; their order is that of integer prompt ids."""
        return list(self._names)

    @property
    def lengths(self) -> dict[str, int]:
        """Virtual tokens of each prompt."""
        return {name: self[name].shape[0] for name in self._names}

    def __getitem__(self, name: str) -> nn.Parameter:
        """The parameter [P, D] of a prompt."""
        self._check_known(name)
        return getattr(self, PREFIX + name)  # type: ignore[no-any-return]

    def forms(self, name: str) -> Any:
        """The ``ParametrizationList`` that a prompt is computed by, None: it is a parameter of its own."""
        self._check_known(name)
        parametrized = parametrize.is_parametrized(self, PREFIX + name)
        return self.parametrizations[PREFIX + name] if parametrized else None  # type: ignore[index]

    @torch.no_grad()
    def values(self, name: str) -> Tensor:
        """[P, D], a copy of a prompt as it is outside training (without dropout): what is saved."""
        forms = self.forms(name)
        if forms is None:
            return self[name].detach().clone()
        training = forms.training
        forms.eval()
        try:
            return forms().detach().clone()
        finally:
            forms.train(training)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._names)

    def add_prompt(
        self,
        name: str,
        num_virtual_tokens: int | None = None,
        *,
        init: str | Tensor | PathLike[str] = "random",
        embedding: nn.Module | Tensor | None = None,
        tokenizer: Any = None,
        init_text: str | None = None,
        class_labels: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> nn.Parameter:
        """Adds a prompt and returns its parameter.

        Args:
            name: letters, digits, ``_`` and ``-``; it becomes a folder's name on disk.
            init: "random", "vocabulary", "text", "class_labels", a tensor [P, D], a path, or the name of a prompt of
                this bank, without a token update, to start from; see
                :func:`softprompt_fast.initial_prompt` for all arguments.
        """
        check_name(name)
        if name in self._names:
            raise ValueError(f"`name` must be new, but the bank has a prompt {name!r}; remove_prompt it first")
        source: str | Tensor | PathLike[str] = init
        if isinstance(init, str) and init not in METHODS and init in self._names:
            source = self.without_token_update(init, "`init`").detach()
        table = None if embedding is None else embedding_table(embedding)
        values = initial_prompt(
            source,
            num_virtual_tokens,
            table,
            tokenizer=tokenizer,
            init_text=init_text,
            class_labels=class_labels,
            seed=seed,
        )
        self._check_width(name, values)
        parameter = nn.Parameter(values.to(**self._placement()))
        self.register_parameter(PREFIX + name, parameter)
        self._names.append(name)
        return parameter

    def add_token_update(
        self, name: str, max_length: int, rank: int, *, seed: int | None = None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Gives a prompt a trainable low-rank update of its rows' token embeddings, by the token's place in its text.

        It starts as no change: a is random, uniform within 1 / sqrt(rank), b zero. DePT trains the two with a much
        smaller learning rate than the prompt: their names begin with ``update_``.

        Args:
            max_length: U, the longest text; tokens from number U on keep their embeddings.
            rank: r

        Returns:
            The parameters ``update_a_<name>`` [U, r] and ``update_b_<name>`` [r, D].
        """
        self._check_known(name)
        for argument, value in (("max_length", max_length), ("rank", rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{argument}` must be a positive integer, got {value!r}")
        if self.token_update(name) is not None:
            raise ValueError(f"`name` must be of a prompt without a token update, but {name!r} has one")
        random = None if seed is None else torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(rank)
        a = torch.empty(max_length, rank).uniform_(-bound, bound, generator=random)
        return self.set_token_update(name, a, torch.zeros(rank, self.embedding_dim))

    def set_token_update(self, name: str, a: Tensor, b: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """Gives a prompt the token update of these factors, a [U, r] and b [r, D], in place of any it has."""
        self._check_known(name)
        self._check_factors(name, a, b)
        factors = tuple(nn.Parameter(values.detach().to(**self._placement(), copy=True)) for values in (a, b))
        for prefix, factor in zip((UPDATE_A, UPDATE_B), factors, strict=True):
            setattr(self, prefix + name, factor)
        return factors[0], factors[1]

    def token_update(self, name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The factors a [U, r] and b [r, D] of a prompt's token update; None if it has none."""
        self._check_known(name)
        a = getattr(self, UPDATE_A + name, None)
        return None if a is None else (a, getattr(self, UPDATE_B + name))

    def without_token_update(self, name: str, what: str) -> nn.Parameter:
        """The parameter [P, D] of a prompt, for `what` that knows prompts only.

        Raises:
            ValueError: it has a token update, without which it is not the prompt that was tuned.
        """
        if self.token_update(name) is not None:
            raise ValueError(f"prompt {name!r} must not have a token update: {what} takes prompts alone")
        return self[name]

    def remove_prompt(self, name: str) -> None:
        self._check_known(name)
        self._drop(name)
        for prefix in self._factors(name):
            delattr(self, prefix + name)
        self._names.remove(name)

    def rename_prompt(self, old: str, new: str) -> None:
        """Gives a prompt another name; its parameters, and so an optimiser's state of them, stay the same."""
        self._check_known(old)
        check_name(new)
        if new in self._names:
            raise ValueError(f"`new` must be unused, but the bank has a prompt {new!r}")
        forms = self.forms(old)
        parameter = self[old] if forms is None else forms.original
        values = parameter.detach().clone()
        self._drop(old)
        self.register_parameter(PREFIX + new, parameter)
        for form in forms or ():
            parametrize.register_parametrization(self, PREFIX + new, form, unsafe=True)
        with torch.no_grad():  # registering writes a form's inverse into the parameter
            parameter.copy_(values)
        for prefix, factor in self._factors(old).items():
            delattr(self, prefix + old)
            self.register_parameter(prefix + new, factor)
        self._names[self._names.index(old)] = new

    def freeze_prompt(self, name: str, frozen: bool = True) -> None:
        """Keeps a prompt, and its token update, from being trained, or frees it again."""
        forms = self.forms(name)
        own = [self[name]] if forms is None else forms.parameters()
        for parameter in (*own, *self._factors(name).values()):
            parameter.requires_grad_(not frozen)

    # --- the pass ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        embedding: nn.Module | Tensor,
        prompt_ids: PromptIds = None,
        labels: Tensor | None = None,
        padding_side: str | None = None,
        **options: Any,
    ) -> PromptedBatch:
        """Puts each row's prompt in front of its tokens.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T] of 1 and 0, or None.
            embedding: the model's input embedding module, or its weight [V, D].
            prompt_ids: the prompt of each row: one name for all, a list of names (None: no prompt), a list or tensor
                of positions in :attr:`names` (-1: no prompt). None: the only prompt of the bank.
            labels: [B, T]
            padding_side: if other than the bank's own.
            options: ``layout``, ``mask_format``, ``lengths`` and whatever else :func:`assemble` takes.

        Returns:
            A mapping for ``model(**batch)``.
        """
        table = embedding_table(embedding)
        chosen, ids, longest = self._select(prompt_ids, input_ids)
        if longest is not None:
            options.setdefault("max_prompt_length", longest)
        return assemble(
            input_ids,
            table.weight,
            chosen.joined(self, input_ids.device),
            chosen.offsets,
            ids,
            attention_mask,
            labels,
            token_factors=chosen.token_factors(),
            padding_side=padding_side or self.padding_side,
            embedding_scale=table.scale,
            padding_idx=table.padding_idx,
            **options,
        )

    def indices(self, prompt_ids: PromptIds, rows: int) -> list[int] | Tensor:
        """Positions in :attr:`names` for each of the rows; a tensor is returned as it is.

        Raises:
            KeyError: an unknown name.
            ValueError: not one prompt per row.
        """
        if prompt_ids is None:
            if len(self) > 1:
                raise ValueError(f"`prompt_ids` must be given, for the bank has {len(self)} prompts: {self.names}")
            return [0 if self._names else -1] * rows
        if isinstance(prompt_ids, Tensor):
            return prompt_ids
        if isinstance(prompt_ids, str):
            prompt_ids = [prompt_ids] * rows
        if len(prompt_ids) != rows:
            raise ValueError(f"`prompt_ids` must name a prompt for each of the {rows} rows, got {len(prompt_ids)}")
        found = []
        for value in prompt_ids:
            if isinstance(value, str):
                self._check_known(value)
                found.append(self._names.index(value))
            else:
                found.append(-1 if value is None else int(value))
        return found

    def choose(self, prompt_ids: PromptIds, rows: int) -> Chosen:
        """The prompts that rows use, each once, and each row's place among them; waits for a GPU if ids are there."""
        ids = self.indices(prompt_ids, rows)
        if isinstance(ids, Tensor):
            if ids.dim() != 1 or ids.is_floating_point():
                raise ValueError(f"`prompt_ids` must be [B] integers, got {ids.dtype} {list(ids.shape)}")
            ids = ids.tolist()
        for row, n in enumerate(ids):
            if not -1 <= n < len(self):
                raise IndexError(f"`prompt_ids` must be -1 to {len(self) - 1}, got {n} for row {row}")
        used = list(dict.fromkeys(n for n in ids if n >= 0))
        place = {n: i for i, n in enumerate(used)} | {-1: -1}
        return self._chosen([self._names[n] for n in used], [place[n] for n in ids])

    def _select(self, prompt_ids: PromptIds, input_ids: Tensor) -> tuple[Chosen, list[int] | Tensor | None, int | None]:
        """The used prompts, the batch's ids into them, and the width for prompts if it must be given."""
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have shape [B, T], got {list(input_ids.shape)}")
        ids = self.indices(prompt_ids, input_ids.shape[0])
        if isinstance(ids, Tensor) and (ids.device.type != "cpu" or torch.compiler.is_compiling()):
            # Unknown on the host without waiting: all prompts, and room for the longest.
            return self._chosen(self._names, []), ids, max([0, *self.lengths.values()])
        chosen = self.choose(ids, input_ids.shape[0])
        if len(chosen.tensors) == 1 and chosen.ids.count(0) == len(chosen.ids):
            return chosen, None, None
        return chosen, chosen.ids, None

    def _chosen(self, names: Sequence[str], ids: list[int]) -> Chosen:
        return Chosen([self[name] for name in names], ids, [self.token_update(name) for name in names])

    # --- saving ---

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What a saved bank has and this one lacks, prompts and token updates, is added; other shapes are replaced."""
        for key, value in state_dict.items():
            name = key.removeprefix(prefix + PREFIX)
            if name == key or not NAME_PATTERN.fullmatch(name):
                continue
            self._check_width(name, value)
            if name not in self._names:
                self.add_prompt(name, init=value)
            elif self[name].shape != value.shape:
                trained = self[name].requires_grad
                setattr(self, PREFIX + name, nn.Parameter(torch.empty_like(value, **self._placement()), trained))
        for name in self._names:
            a, b = (state_dict.get(prefix + kind + name) for kind in (UPDATE_A, UPDATE_B))
            if a is None or b is None:
                continue
            known = self.token_update(name)
            if known is None or (known[0].shape, known[1].shape) != (a.shape, b.shape):
                trained = self[name].requires_grad if known is None else known[0].requires_grad
                for factor in self.set_token_update(name, a, b):
                    factor.requires_grad_(trained)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}: {length}" for name, length in self.lengths.items())
        updated = [name for name in self._names if self.token_update(name) is not None]
        also = f", token_updates={updated}" if updated else ""
        return f"embedding_dim={self.embedding_dim}, prompts={{{shown}}}{also}"

    # --- helpers ---

    def _placement(self) -> dict[str, Any]:
        """dtype and device of the prompts there are, or those asked for at first."""
        for parameter in self.parameters():
            return {"dtype": parameter.dtype, "device": parameter.device}
        return self._factory

    def _drop(self, name: str) -> None:
        """Removes a prompt's parameter, and the parametrizations that compute it."""
        if self.forms(name) is not None:
            parametrize.remove_parametrizations(self, PREFIX + name, leave_parametrized=False)
        delattr(self, PREFIX + name)

    def _replace(self, name: str, parameter: nn.Parameter) -> None:
        """Another parameter in a prompt's place, without parametrizations."""
        self._drop(name)
        self.register_parameter(PREFIX + name, parameter)

    def _check_known(self, name: str) -> None:
        if name not in self._names:
            raise KeyError(f"no prompt {name!r} in the bank, which has {self.names}")

    def _factors(self, name: str) -> dict[str, nn.Parameter]:
        """A prompt's token update by the prefix of its names; empty if it has none."""
        return dict(zip((UPDATE_A, UPDATE_B), self.token_update(name) or (), strict=False))

    def _check_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or b.shape[1] != self.embedding_dim:
            raise ValueError(
                f"the token update of {name!r} must have factors [U, r] and [r, {self.embedding_dim}], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the token update of {name!r} must be finite")

    def _check_width(self, name: str, values: Tensor) -> None:
        if values.dim() != 2 or values.shape[1] != self.embedding_dim:
            raise ValueError(f"prompt {name!r} must have shape [P, {self.embedding_dim}], got {list(values.shape)}")


def check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"`name` must be 1 to 128 letters, digits, '_' or '-', and not start with '-', got {name!r}")
