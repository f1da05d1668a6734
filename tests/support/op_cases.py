"""Inputs for ``assemble`` of every kind it accepts, and how two results are compared: bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.ops.assemble import assemble_reference, functional
from softprompt_fast.ops.assemble.checks import FLOATS, INTEGERS, LAYOUTS, MASK_FORMATS, SIDES
from softprompt_fast.ops.extension import backend
from softprompt_fast.ops.extension.contract import AssembleCall, PlanColumn

MASKS = (torch.bool, *INTEGERS, *FLOATS)
IDS = (torch.int64, torch.int32)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8, 65504.0, 65520.0, 3.4e38, 1.00390625)


@contextmanager
def using(ops: backend.Ops | None) -> Iterator[None]:
    """Runs ``assemble`` and its backward with these ops; None: with the twin."""
    with mock.patch.object(backend, "_ops", ops):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN or the largest integer, so that no unwritten output passes for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Case:
    """One call of ``assemble``, with what a test needs to know about it."""

    input_ids: Tensor
    embedding: Tensor
    prompts: Tensor
    prompt_offsets: Any
    prompt_ids: Any
    attention_mask: Tensor | None
    labels: Tensor | None
    options: dict[str, Any]
    token_factors: tuple[Tensor, Tensor] | None = None

    def run(self, ops: backend.Ops | None, **options: Any) -> spf.PromptedBatch:
        with using(ops), poisoned():
            return spf.assemble(
                self.input_ids,
                self.embedding,
                self.prompts,
                self.prompt_offsets,
                self.prompt_ids,
                self.attention_mask,
                self.labels,
                token_factors=self.token_factors,
                **(self.options | options),
            )

    def to(self, device: str) -> Case:
        """The same call with its tensors, and those of its offsets and ids, on a device; strides are kept."""
        moved: dict[str, Any] = {
            name: _move(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.token_factors is not None:
            moved["token_factors"] = tuple(_move(factor, device) for factor in self.token_factors)
        return replace(self, **moved)

    def token_update(self) -> Tensor | None:
        """[N, U, D]: what the factors say."""
        if self.token_factors is None:
            return None
        return functional.token_update(*self.token_factors, self.input_ids.shape[1], self.embedding.dtype)

    def prompt_of(self, row: int) -> int:
        if self.prompt_ids is None:
            return 0 if len(self.prompt_offsets) == 2 else -1
        return int(self.prompt_ids[row])

    def real(self) -> list[list[bool]]:
        if self.attention_mask is None:
            return torch.ones(self.input_ids.shape, dtype=torch.bool).tolist()
        return (self.attention_mask != 0).tolist()


def op_call(case: Case) -> AssembleCall:
    """The arguments that ``assemble`` gives the op for this case."""
    seen: list[AssembleCall] = []

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        seen.append(AssembleCall(*arguments))
        return assemble_reference(seen[-1])

    case.run(backend.Ops(**{field.name: record for field in fields(backend.Ops)}))
    return seen[0]


def _move(values: Tensor, device: str) -> Tensor:
    """With its whole storage, so that strides and alignment stay as they are."""
    size = values.untyped_storage().nbytes() // values.element_size()
    return (
        values.as_strided((size,), (1,), 0)
        .to(device)
        .as_strided(values.shape, values.stride(), values.storage_offset())
    )


def _strided(values: Tensor, arrangement: str) -> Tensor:
    """The same matrix, laid out differently in memory."""
    rows, columns = values.shape
    if arrangement == "transposed":
        return values.t().contiguous().t()
    if arrangement == "sliced":  # every second row and column of something larger, at an odd address
        larger = torch.full((2 * rows + 1, 2 * columns + 1), 7, dtype=values.dtype)
        larger[1::2, 1::2] = values
        return larger[1::2, 1::2]
    if arrangement == "columns":  # adjacent elements, but rows further apart and at an odd address
        larger = torch.full((rows, columns + 3), 7, dtype=values.dtype)
        larger[:, 1 : columns + 1] = values
        return larger[:, 1 : columns + 1]
    if arrangement == "expanded" and rows > 0:
        return values[:1].expand(rows, columns)
    return values.contiguous()


ARRANGEMENTS = st.sampled_from(["contiguous", "transposed", "sliced", "columns", "expanded"])


def _vectors(rows: int, dim: int, dtype: torch.dtype, random: torch.Generator, special: bool) -> Tensor:
    values = torch.randn(rows, dim, generator=random, dtype=torch.float64) * 30
    if special and values.numel():
        at = torch.randint(values.numel(), (max(1, values.numel() // 4),), generator=random)
        choice = torch.randint(len(SPECIAL), at.shape, generator=random)
        values.view(-1)[at] = torch.tensor(SPECIAL, dtype=torch.float64)[choice]
    return values.to(dtype)


def _mask(kind: str, rows: int, tokens: int, random: torch.Generator) -> Tensor:
    place, length = torch.arange(tokens), torch.randint(tokens + 1, (rows, 1), generator=random)
    if kind == "right":
        return place < length
    if kind == "left":
        return place >= length
    if kind == "scattered":
        return torch.randint(2, (rows, tokens), generator=random) > 0
    return torch.full((rows, tokens), kind == "ones")


@st.composite
def cases(
    draw: Callable[..., Any],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    layouts: tuple[str, ...] = LAYOUTS,
    max_rows: int = 5,
    max_tokens: int = 9,
    prompt_lengths: tuple[int, ...] = (3, 1, 2, 7, 0),
    dims: tuple[int, ...] = (7, 1, 2, 3, 4, 8, 16, 33, 64),
    special: bool = True,
) -> Case:
    """A valid call; ``special``: with values that are rounded, overflow or are no number."""
    # hypothesis prefers the first of several choices, so the first ones fill a batch and do not leave it empty.
    flip, pick = st.booleans(), lambda *choices: draw(st.sampled_from(choices))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, tokens = max_rows - draw(st.integers(0, max_rows)), max_tokens - draw(st.integers(0, max_tokens))
    vocabulary, dim = draw(st.integers(1, 30)), pick(*dims)
    lengths = [pick(*prompt_lengths) for _ in range(pick(2, 1, 3, 4, 0))]
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    dtype = pick(*dtypes)
    embedding = _strided(_vectors(vocabulary, dim, dtype, random, special), draw(ARRANGEMENTS))
    prompt_dtype = pick(dtype, torch.float32)
    prompts = _strided(_vectors(offsets[-1], dim, prompt_dtype, random, special), draw(ARRANGEMENTS))

    mask_dtype = pick(None, *MASKS)
    mask = _mask(pick("scattered", "left", "right", "ones", "zeros"), rows, tokens, random)
    input_ids = torch.randint(vocabulary, (rows, tokens), generator=random)
    if mask_dtype is None:
        mask = torch.ones_like(mask)
    input_ids = torch.where(mask, input_ids, pick(-1, 2**31 - 1, -(2**31)))  # ids at padding are never looked at
    attention_mask = None
    if mask_dtype is not None:
        attention_mask = torch.where(mask, 1.0, pick(0.0, -0.0)).to(mask_dtype)
    # One arrangement for both, since expanding repeats the first row.
    arrangement = draw(ARRANGEMENTS)
    input_ids = _strided(input_ids.to(pick(*IDS)), arrangement)
    if attention_mask is not None:
        attention_mask = _strided(attention_mask, arrangement)
    labels = None
    if draw(flip):
        labels = torch.randint(-(2**31), 2**31, (rows, tokens), generator=random).to(pick(*IDS))
        labels = _strided(labels, draw(ARRANGEMENTS))

    prompt_ids: Any = None
    if len(lengths) > 1 or draw(flip):
        prompt_ids = torch.randint(-1, len(lengths), (rows,), generator=random)
        form = pick("int64", "int32", "list")
        prompt_ids = prompt_ids.tolist() if form == "list" else prompt_ids.to(getattr(torch, form))
    prompt_offsets = pick(list, tuple, torch.tensor, lambda values: torch.tensor(values, dtype=torch.int32))(offsets)

    options = {
        "layout": pick(*layouts),
        "padding_side": pick(*SIDES),
        "mask_format": pick(*MASK_FORMATS),
        "causal": draw(flip),
        "sliding_window": pick(None, 1, 2, 5),
        "embedding_scale": pick(1.0, 1.0, 0.5, 25.298221281347036, -3.0),
    }
    token_factors = None
    if pick(True, True, False):
        reach, rank = pick(3, 1, max_tokens, 2, 0, max_tokens + 2), pick(2, 1, 5, 0)
        a = _vectors(len(lengths) * reach, rank, pick(torch.float32, dtype), random, special)
        b = _vectors(len(lengths) * rank, dim, pick(torch.float32, dtype), random, special)
        a = _strided(a, draw(ARRANGEMENTS))
        token_factors = a.unflatten(0, (len(lengths), reach)), b.unflatten(0, (len(lengths), rank))
    case = Case(
        input_ids, embedding, prompts, prompt_offsets, prompt_ids, attention_mask, labels, options, token_factors
    )
    if draw(flip):
        options["max_prompt_length"] = max(lengths, default=0) + draw(st.integers(0, 2))
    if draw(flip):
        options["lengths"] = [sum(row) for row in case.real()]
    return case


@st.composite
def broken(draw: Callable[..., Any]) -> AssembleCall:
    """A call of the op that breaks one or more of its rules."""
    case: Case = draw(cases(max_tokens=5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    call = op_call(case)

    def spoil(values: torch.Tensor, *wrong: float) -> torch.Tensor:
        at = torch.randint(3, values.shape, generator=random) == 0
        choice = torch.tensor(wrong, dtype=torch.float64)[torch.randint(len(wrong), values.shape, generator=random)]
        return torch.where(at, choice, values.double()).to(values.dtype)  # not every version has `where` for uint16

    mask, plan = call.attention_mask, call.plan
    vocabulary, rows, count = len(call.embedding), len(call.prompts), call.prompt_offsets.numel() - 1
    for rule in draw(st.sets(st.sampled_from(["id", "offset", "prompt", "mask", "length"]), min_size=1)):
        if rule == "id":
            call = call._replace(input_ids=spoil(call.input_ids, -1, vocabulary, 2**31 - 1))
        elif rule == "offset":
            call = call._replace(prompt_offsets=spoil(call.prompt_offsets, -1, rows + 1, 1, 2**40))
        elif rule == "prompt" and plan is None and call.prompt_ids is not None:
            call = call._replace(prompt_ids=spoil(call.prompt_ids, -2, count, 2**40))
        elif rule == "prompt" and plan is not None:
            spoilt = plan.clone()
            spoilt[:, PlanColumn.PROMPT] = spoil(plan[:, PlanColumn.PROMPT], -2, count)
            call = call._replace(plan=spoilt)
        elif rule == "mask" and mask is not None:
            wrong = (2, 0.5, float("nan"), -float("inf")) if mask.dtype.is_floating_point else (2, 3)
            call = call._replace(attention_mask=spoil(mask, *wrong))
        elif rule == "length" and plan is None and call.width > 0:  # a width that does not hold every row
            width = call.width - draw(st.integers(1, call.width))
            call = call._replace(width=width, slots=len(call.input_ids) * width)
        elif rule == "length" and mask is not None:  # a plan that counts other tokens
            call = call._replace(attention_mask=spoil(mask, 0, 1))
    return call


def output_gradient(case: Case) -> Tensor:
    """A fixed gradient of ``inputs_embeds``."""
    shape = case.run(None).inputs_embeds.shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(case.embedding)


def gradients(case: Case, ops: backend.Ops | None, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of prompts, embedding and, if there is one, the token update."""
    update = case.token_update()
    leaves = tuple(x.detach().requires_grad_() for x in (case.prompts, case.embedding, update) if x is not None)
    as_leaf = mock.patch.object(functional, "token_update", lambda *_: leaves[2])
    with using(ops), poisoned(), as_leaf:
        embeds = replace(case, prompts=leaves[0], embedding=leaves[1]).run(ops).inputs_embeds
        grad = output_gradient(case) if grad is None else grad
        found = torch.autograd.grad(embeds, leaves, grad, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True))


def expected_gradients(case: Case) -> tuple[Tensor, ...]:
    """The same by definition, on the CPU: sums in ascending rows, in float32 (float64 for float64), rounded once.

    A batch on a GPU may be wider than the same on the CPU: it has room for the longest prompt, used or not.
    """
    grad, batch = output_gradient(case).flatten(0, 1).cpu(), case.run(None)
    offsets = [int(offset) for offset in case.prompt_offsets]
    if batch.packed is not None:
        uses = batch.packed.prompts
    elif case.prompt_ids is None:
        uses = [0] * len(case.input_ids)
    else:
        uses = [int(n) for n in case.prompt_ids]

    def wide(like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

    prompts, embedding = wide(case.prompts), wide(case.embedding)
    for n, slot in zip(uses, batch.prompt_slots.tolist(), strict=True):
        for place in range(offsets[n + 1] - offsets[n] if slot >= 0 else 0):
            prompts[offsets[n] + place] += grad[slot + place].to(prompts.dtype)
    for token, slot in zip(case.input_ids.flatten().tolist(), batch.token_slots.flatten().tolist(), strict=True):
        if slot >= 0:
            embedding[token] += grad[slot].to(embedding.dtype)
    used = case.input_ids[batch.token_slots >= 0].unique().cpu()
    embedding[used] *= case.options.get("embedding_scale", 1.0)
    expected = prompts.to(case.prompts.dtype), embedding.to(case.embedding.dtype)
    update = case.token_update()
    if update is None:
        return expected
    update = torch.zeros_like(update, device="cpu")
    for row, slots in enumerate(batch.token_slots.tolist()):
        taken = [slot for slot in slots if slot >= 0][: update.shape[1]]
        for rank, slot in enumerate(taken if case.prompt_of(row) >= 0 else []):
            update[case.prompt_of(row), rank] += grad[slot].to(update.dtype)
    return *expected, update


def bit_patterns(dtype: torch.dtype) -> Case:
    """Every pattern of 16 bits as an embedding that is scaled, half of them with an update added, many of 32 bits as
    prompts that are converted."""
    embedding = torch.arange(2**16).to(torch.int16).view(dtype).view(64, 1024)
    prompts = torch.randint(-(2**31), 2**31, (1000, 1024)).to(torch.int32).view(torch.float32)
    options = {"embedding_scale": 0.37}
    factors = torch.randn(1, 32, 3), torch.randn(1, 3, 1024)
    return Case(torch.arange(64)[None], embedding, prompts, [0, 1000], None, None, None, options, factors)


def prompt_without_room(layout: str) -> Case:
    """An unchecked call whose first row has no room for its prompt of 7 vectors (padded) or its tokens (packed)."""
    options = {"layout": layout, "check": False, "max_prompt_length": 1, "lengths": [1, 2]}
    embedding, prompts = torch.randn(5, 4), torch.randn(8, 4)
    return Case(torch.tensor([[1, 2], [3, 4]]), embedding, prompts, [0, 7, 8], [0, 1], None, None, options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and bits; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.detach().contiguous().view(bits) == b.detach().contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


FIELDS = ("inputs_embeds", "attention_mask", "position_ids", "labels", "token_slots", "prompt_slots", "status")


def assert_same(a: spf.PromptedBatch, b: spf.PromptedBatch) -> None:
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or same_bits(x, y), f"{name}\n{x}\n{y}"
    assert (a.packed is None) == (b.packed is None)
    if a.packed is not None and b.packed is not None:
        assert torch.equal(a.packed.row_ids, b.packed.row_ids)
        assert torch.equal(a.packed.cu_seqlens, b.packed.cu_seqlens)


def assert_same_outputs(ops: backend.Ops, call: AssembleCall) -> None:
    """The op against the twin, given the same call."""
    with poisoned():
        for ours, twin in zip(ops.assemble(*call), assemble_reference(call), strict=True):
            assert same_bits(ours, twin), f"{ours}\n{twin}"
