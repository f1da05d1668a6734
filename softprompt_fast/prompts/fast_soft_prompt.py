"""``FastSoftPrompt``: a trainable bank of named soft prompts of any lengths, on top of the fused pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..base.modules import evaluating
from ..hf.embedding import embedding_table
from ..ops.assemble.batch import PromptedBatch
from ..ops.assemble.functional import assemble
from .initialization import INITIALIZATIONS, InitOptions, initial_prompt
from .parameter_names import PARAMETER_PREFIX
from .placement import add_with_frozen
from .selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
UPDATE_A, UPDATE_B = "update_a_", "update_b_"
"""Begin the names of a token update's factors."""

PromptIds = str | Sequence["str | int | tuple[str | int, ...] | None"] | Tensor | None


class FastSoftPrompt(nn.Module):
    """A bank of soft prompts, each a parameter ``[P_n, D]`` of its own.

    Works in any training loop: an optimiser sees ordinary parameters, ``state_dict`` holds one entry per prompt, and
    a transformers model takes the result of a call as it is::

        bank = FastSoftPrompt(model.config.hidden_size, {"movies": 20, "tweets": 50})
        batch = bank(input_ids, attention_mask, embedding=model.get_input_embeddings(), prompt_ids=["movies", "tweets"])
        output = model(**batch)

    A prompt may also have a token update (DePT, arXiv 2309.05173): row t of ``update_a_<name> [U, r] @
    update_b_<name> [r, D]`` is added to the vector of its rows' token number t, t < U, in the same pass. See
    :meth:`add_token_update`.

    Args:
        embedding_dim: D, the model's hidden size at its input.
        prompts: names and lengths, filled with normal noise of standard deviation 0.02. For other initial
            values use :meth:`add_prompt`.
        padding_side: where the batches that it makes are padded, "right" or "left".
        dtype, device: dtype and device of the parameters. Use float32 for a bfloat16 model too: the pass casts.
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
            self.add_prompt(name, init=torch.randn(length, embedding_dim, dtype=torch.float32) * 0.02)

    @classmethod
    def frozen(cls, prompts: Mapping[str, Tensor], like: FastSoftPrompt) -> FastSoftPrompt:
        """A bank of tensors [P, D] that are neither copied nor trained, with the settings of another bank."""
        bank = cls(like.embedding_dim, padding_side=like.padding_side)
        for name, tensor in prompts.items():
            bank.register_parameter(PARAMETER_PREFIX + name, nn.Parameter(tensor, requires_grad=False))
            bank._names.append(name)
        return bank

    @classmethod
    def holding(cls, prompts: Mapping[str, Tensor], embedding_dim: int) -> FastSoftPrompt:
        """A bank of tensors [P, D] that stay part of the caller's graph: gradients flow to what computed them."""
        bank = cls(embedding_dim)
        for name, tensor in prompts.items():
            setattr(bank, PARAMETER_PREFIX + name, tensor)
            bank._names.append(name)
        return bank

    # --- the bank ---

    @property
    def names(self) -> list[str]:
        """The prompts' names, in the order of integer prompt ids."""
        return list(self._names)

    @property
    def lengths(self) -> dict[str, int]:
        """Virtual tokens of each prompt."""
        return {name: self[name].shape[0] for name in self._names}

    def __getitem__(self, name: str) -> nn.Parameter:
        """The parameter [P, D] of a prompt."""
        self._check_known(name)
        return getattr(self, PARAMETER_PREFIX + name)  # type: ignore[no-any-return]

    def forms(self, name: str) -> Any:
        """The ``ParametrizationList`` that computes a prompt; None: the prompt is an ordinary parameter."""
        self._check_known(name)
        parametrized = parametrize.is_parametrized(self, PARAMETER_PREFIX + name)
        return self.parametrizations[PARAMETER_PREFIX + name] if parametrized else None  # type: ignore[index]

    @torch.no_grad()
    def snapshot(self, name: str) -> Tensor:
        """[P, D], a copy of a prompt's values outside training (without dropout): the values that are saved."""
        forms = self.forms(name)
        if forms is None:
            return self[name].detach().clone()
        with evaluating(forms):
            return forms().detach().clone()  # type: ignore[no-any-return]

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
        **options: Unpack[InitOptions],
    ) -> nn.Parameter:
        """Adds a prompt and returns its parameter.

        Args:
            name: letters, digits, ``_`` and ``-``; it becomes a folder's name on disk.
            num_virtual_tokens, init: as in :func:`softprompt_fast.initial_prompt`. ``init`` may also be the name of a
                prompt of this bank to copy; that prompt must not have a token update.
            embedding: the model's input embedding module, or its weight [V, D]; not needed to copy values.
            options: ``tokenizer``, ``init_text``, ``class_labels``, ``seed``: see
                :class:`~softprompt_fast.prompts.initialization.InitOptions`.
        """
        check_name(name)
        if name in self._names:
            raise ValueError(f"the bank already has a prompt {name!r}; choose another name or remove it first")
        source: str | Tensor | PathLike[str] = init
        if isinstance(init, str) and init not in INITIALIZATIONS and init in self._names:
            source = self.plain_parameter(init, purpose="`init`").detach()
        table = None if embedding is None else embedding_table(embedding)
        values = initial_prompt(source, num_virtual_tokens, table, **options)
        self._check_width(name, values)
        parameter = nn.Parameter(values.to(**self._placement()))
        self.register_parameter(PARAMETER_PREFIX + name, parameter)
        self._names.append(name)
        return parameter

    def add_token_update(
        self, name: str, max_length: int, rank: int, *, seed: int | None = None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Gives a prompt a trainable low-rank update of its rows' token embeddings, by the token's place in its text.

        The update is zero at the start: a is random, uniform within 1 / sqrt(rank), and b is zero. DePT trains the
        factors with a much smaller learning rate than the prompt; their names begin with ``update_``.

        Args:
            max_length: U, the longest text; tokens from number U on are not changed.
            rank: r

        Returns:
            The parameters ``update_a_<name>`` [U, r] and ``update_b_<name>`` [r, D].
        """
        self._check_known(name)
        for argument, value in (("max_length", max_length), ("rank", rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{argument}` must be a positive integer, got {value!r}")
        if self.token_update(name) is not None:
            raise ValueError(f"prompt {name!r} already has a token update; set_token_update replaces it")
        random = None if seed is None else torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(rank)
        a = torch.empty(max_length, rank, dtype=torch.float32).uniform_(-bound, bound, generator=random)
        return self.set_token_update(name, a, torch.zeros(rank, self.embedding_dim, dtype=torch.float32))

    def set_token_update(self, name: str, a: Tensor, b: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """Sets the factors a [U, r] and b [r, D] of a prompt's token update; an earlier update is replaced."""
        self._check_known(name)
        self._check_factors(name, a, b)
        factors = tuple(nn.Parameter(values.detach().to(**self._placement(), copy=True)) for values in (a, b))
        for prefix, factor in zip((UPDATE_A, UPDATE_B), factors, strict=True):
            setattr(self, prefix + name, factor)
        return factors[0], factors[1]

    def token_update(self, name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The factors a [U, r] and b [r, D] of a prompt's token update; None: it has none."""
        self._check_known(name)
        a = getattr(self, UPDATE_A + name, None)
        return None if a is None else (a, getattr(self, UPDATE_B + name))

    def plain_parameter(self, name: str, *, purpose: str) -> nn.Parameter:
        """The parameter [P, D] of a prompt that has no token update.

        Args:
            purpose: what cannot use a token update; named in the error.

        Raises:
            ValueError: the prompt has a token update; without it the prompt is not what was tuned.
        """
        if self.token_update(name) is not None:
            raise ValueError(f"prompt {name!r} has a token update, which {purpose} cannot use")
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
            raise ValueError(f"the bank already has a prompt {new!r}; choose another name")
        forms = self.forms(old)
        parameter = self[old] if forms is None else forms.original
        values = parameter.detach().clone()
        self._drop(old)
        self.register_parameter(PARAMETER_PREFIX + new, parameter)
        for form in forms or ():
            parametrize.register_parametrization(self, PARAMETER_PREFIX + new, form, unsafe=True)
        with torch.no_grad():  # registering writes a form's inverse into the parameter
            parameter.copy_(values)
        for prefix, factor in self._factors(old).items():
            delattr(self, prefix + old)
            self.register_parameter(prefix + new, factor)
        self._names[self._names.index(old)] = new

    def replace_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Makes `parameter` [P, D] the prompt; parametrizations that computed it are removed."""
        self._check_known(name)
        self._drop(name)
        self.register_parameter(PARAMETER_PREFIX + name, parameter)

    def freeze_prompt(self, name: str, frozen: bool = True) -> None:
        """Excludes a prompt and its token update from training, or includes them again."""
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
                of positions in :attr:`names` (-1: no prompt). A tuple in the list: these prompts, one after the other.
                None: the only prompt of the bank.
            labels: [B, T]
            padding_side: None: the bank's own.
            options: ``layout``, ``mask_format``, ``lengths`` and other arguments of :func:`assemble`.

        Returns:
            A mapping for ``model(**batch)``.
        """
        table = embedding_table(embedding)
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have shape [B, T], got {list(input_ids.shape)}")
        ids: list[int] | Tensor | None
        if isinstance(prompt_ids, Tensor) and (prompt_ids.device.type != "cpu" or torch.compiler.is_compiling()):
            # The host does not know the ids without waiting: all prompts are passed, and slots for the longest.
            selection, ids = self._selection([[name] for name in self._names], []), prompt_ids
            options.setdefault("max_prompt_length", max([0, *self.lengths.values()]))
        else:
            selection = self.select(prompt_ids, input_ids.shape[0])
            one_for_all = len(selection.prompts) == 1 and selection.ids.count(0) == len(selection.ids)
            ids = None if one_for_all else selection.ids
        return assemble(
            input_ids,
            table.weight,
            selection.joined(input_ids.device),
            selection.offsets,
            ids,
            attention_mask,
            labels,
            token_factors=selection.token_factors(),
            padding_side=padding_side or self.padding_side,
            embedding_scale=table.scale,
            padding_idx=table.padding_idx,
            **options,
        )

    def select(self, prompt_ids: PromptIds, rows: int) -> Selection:
        """The prompts that rows use, each once, and each row's place among them. Waits for a GPU if the ids are there.

        Raises:
            KeyError: an unknown name.
            IndexError: an id that is not -1 or a position in :attr:`names`.
            ValueError: not one prompt per row, or a row that joins a prompt with a token update.
        """
        ids = self._positions(prompt_ids, rows)
        for row, own in enumerate(ids):
            for n in own:
                if not 0 <= n < len(self):
                    raise IndexError(f"`prompt_ids` must be -1 to {len(self) - 1}, got {n} for row {row}")
        used = list(dict.fromkeys(own for own in ids if own))
        place = {own: i for i, own in enumerate(used)} | {(): -1}
        return self._selection([[self._names[n] for n in own] for own in used], [place[own] for own in ids])

    def _positions(self, prompt_ids: PromptIds, rows: int) -> list[tuple[int, ...]]:
        """The positions in :attr:`names` of each row's prompts; (): no prompt."""
        if prompt_ids is None:
            if len(self) > 1:
                raise ValueError(f"`prompt_ids` must be given because the bank has {len(self)} prompts: {self.names}")
            return [(0,) if self._names else ()] * rows
        if isinstance(prompt_ids, Tensor):
            if prompt_ids.dim() != 1 or prompt_ids.is_floating_point():
                shape = f"{prompt_ids.dtype} {list(prompt_ids.shape)}"
                raise ValueError(f"`prompt_ids` must be [B] integers, got {shape}")
            return [(n,) if n != -1 else () for n in prompt_ids.tolist()]
        if isinstance(prompt_ids, str):
            prompt_ids = [prompt_ids] * rows
        if len(prompt_ids) != rows:
            raise ValueError(f"`prompt_ids` must name a prompt for each of the {rows} rows, got {len(prompt_ids)}")
        return [
            tuple(
                self._position(one)
                for one in (value if isinstance(value, (tuple, list)) else (value,))
                if one not in (None, -1)
            )
            for value in prompt_ids
        ]

    def _position(self, value: str | int) -> int:
        if not isinstance(value, str):
            return int(value)
        self._check_known(value)
        return self._names.index(value)

    def _selection(self, names: Sequence[Sequence[str]], ids: list[int]) -> Selection:
        """Names of the prompts that stand one after the other in each place."""
        updates: list[tuple[Tensor, Tensor] | None] = []
        for own in names:
            found = [update for update in map(self.token_update, own) if update is not None]
            if found and len(own) > 1:
                raise ValueError(f"`prompt_ids` must not join prompts with token updates, got {', '.join(own)}")
            updates.append(found[0] if found else None)
        prompts = [self[own[0]] if len(own) == 1 else torch.cat([self[name] for name in own]) for own in names]
        return Selection(prompts, ids, updates, self.embedding_dim)

    # --- saving ---

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adds the prompts and token updates that only the saved bank has; replaces those that have another shape."""
        add_with_frozen(self, state_dict, prefix)
        for key, value in state_dict.items():
            name = key.removeprefix(prefix + PARAMETER_PREFIX)
            if name == key or not NAME_PATTERN.fullmatch(name):
                continue
            self._check_width(name, value)
            if name not in self._names:
                self.add_prompt(name, init=value)
            elif self[name].shape != value.shape:
                trained = self[name].requires_grad
                empty = torch.empty_like(value, **self._placement())
                setattr(self, PARAMETER_PREFIX + name, nn.Parameter(empty, trained))
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
        """dtype and device of the bank's prompts; of the constructor's arguments while there is no prompt."""
        for parameter in self.parameters():
            return {"dtype": parameter.dtype, "device": parameter.device}
        return self._factory

    def _drop(self, name: str) -> None:
        """Removes a prompt's parameter, and the parametrizations that compute it."""
        if self.forms(name) is not None:
            parametrize.remove_parametrizations(self, PARAMETER_PREFIX + name, leave_parametrized=False)
        delattr(self, PARAMETER_PREFIX + name)

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
