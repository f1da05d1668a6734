"""The public function ``assemble`` and its ``torch.autograd.Function``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..extension import backend as _library
from . import checks as _checks
from . import reference
from .batch import PackedRows, PromptedBatch


class _Assemble(torch.autograd.Function):
    """The native op with its gradient. Everything but the vectors is without one."""

    @staticmethod
    def forward(
        ctx: Any,
        prompts: Tensor,
        embedding: Tensor,
        token_update: Tensor | None,
        padding_idx: int,
        arguments: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # One method, not `setup_context`: with that, PyTorch inspects the signature on every call, for longer than
        # a small batch takes.
        ops = _library.ops_for(prompts.device)
        assert ops is not None
        input_ids, prompt_offsets, prompt_ids, _, _, plan, *_, scale = arguments
        output = ops.assemble(input_ids, embedding, prompts, *arguments[1:], token_update)
        token_slots, prompt_slots = output[4], output[5]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward gets a tensor of zeros for each of the others
        ctx.prompt_rows, ctx.prompt_dtype = prompts.shape[0], prompts.dtype
        ctx.vocabulary, ctx.scale, ctx.padding_idx = embedding.shape[0], scale, padding_idx
        use_ids = prompt_ids if plan is None else plan[: prompt_slots.shape[0], 2].contiguous()
        ctx.update_shape = None if token_update is None else token_update.shape
        row_prompts = None if token_update is None else prompt_ids
        ctx.save_for_backward(prompt_slots, prompt_offsets, use_ids, input_ids, token_slots, row_prompts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        prompt_slots, prompt_offsets, use_ids, input_ids, token_slots, row_prompts = ctx.saved_tensors
        ops = _library.ops_for(grad.device)
        assert ops is not None
        for_prompts = for_embedding = for_update = None
        if ctx.needs_input_grad[0]:
            for_prompts = ops.prompt_backward(
                grad, prompt_slots, use_ids, prompt_offsets, ctx.prompt_rows, ctx.prompt_dtype
            )
        if ctx.needs_input_grad[1]:
            for_embedding = ops.embedding_backward(
                grad, input_ids, token_slots, ctx.vocabulary, ctx.padding_idx, ctx.scale, grad.dtype
            )
        if ctx.needs_input_grad[2]:
            prompts, reach, _ = ctx.update_shape
            known = (input_ids >= 0) & (input_ids < ctx.vocabulary)  # other tokens are zeros
            rows = _update_rows(token_slots, known, row_prompts, prompts, reach)
            wide = torch.promote_types(grad.dtype, torch.float32)
            for_update = ops.embedding_backward(grad, rows, token_slots, prompts * reach, -1, 1.0, wide)
            for_update = for_update.view(ctx.update_shape)
        return for_prompts, for_embedding, for_update, None, None


def _update_rows(token_slots: Tensor, known: Tensor, row_prompts: Tensor | None, prompts: int, reach: int) -> Tensor:
    """[B, T]: which row of a token update [N, U, D], seen as [N * U, D], a token got; N * U for none."""
    placed = token_slots >= 0
    rank = placed.cumsum(1) - 1
    first: Tensor | int = 0 if prompts else -1
    if row_prompts is not None:
        first = row_prompts[:, None]
    updated = placed & known & (rank < reach) & (first >= 0) & (first < prompts)
    return torch.where(updated, first * reach + rank, prompts * reach)


class _Product(torch.autograd.Function):
    """[N, U, r] @ [N, r, D] in the factors' own dtype, forward and backward, under autocast too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _without_autocast(a.device.type):
            return torch.bmm(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with _without_autocast(a.device.type):
            for_a = torch.bmm(grad, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
            for_b = torch.bmm(a.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
        return for_a, for_b


def _without_autocast(device_type: str) -> Any:
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def assemble(
    input_ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    prompt_offsets: Tensor | Sequence[int],
    prompt_ids: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    token_factors: tuple[Tensor, Tensor] | None = None,
    layout: str = "padded",
    padding_side: str = "right",
    mask_format: str = "2d",
    causal: bool = True,
    sliding_window: int | None = None,
    embedding_scale: float = 1.0,
    lengths: Tensor | Sequence[int] | None = None,
    max_prompt_length: int | None = None,
    padding_idx: int | None = None,
    check: bool | None = None,
    check_finite: bool = False,
) -> PromptedBatch:
    """Joins soft prompts and token embeddings into a batch that a model can run, in one pass over the output.

    Each row becomes ``[prompt][text][pad]`` (``padding_side="right"``) or ``[pad][prompt][text]`` (``"left"``), where
    text is the row's real tokens, wherever the input's padding stood. Positions count prompt and text only, so no
    row depends on its neighbours. ``layout="packed"`` puts each distinct prompt of the batch once, then every row's
    text, into one sequence without padding.

    Args:
        input_ids: [B, T] int64 or int32. Ids at padding are never looked at.
        embedding: [V, D] float32, bfloat16, float16 or float64: the model's input embeddings.
        prompts: [R, D], every prompt's vectors one after the other; float32 or the embedding's dtype.
        prompt_offsets: [N + 1], ascending from 0 to R: prompt n is ``prompts[offsets[n]:offsets[n + 1]]``. A list of
            ints (or a CPU tensor) spares a GPU a synchronisation.
        prompt_ids: [B], the prompt of each row, -1 for none. May be left out if there is exactly one prompt.
        attention_mask: [B, T] of 1 (token) and 0 (padding), any boolean, integer or float dtype. None: all ones.
        labels: [B, T] int64 or int32, carried along; -100 is put on prompts and padding.
        token_factors: (a [N, U, r], b [N, r, D]), float32 or the embedding's dtype: ``(a[n] @ b[n])[t]`` is added to
            the vector of real token number t, t < U, of each row of prompt n; not to later tokens, nor in rows without
            a prompt. Multiplied out and added in float32 (float64 for float64), rounded once. DePT, arXiv 2309.05173.
        layout: "padded" ([B, S, D], S = longest prompt + T) or "packed" ([1, K, D]).
        padding_side: where padding of the padded layout stands.
        mask_format: "2d" ([B, S], dtype of ``attention_mask``, int64 without one), "4d_bool" or "4d_additive"
            ([B, 1, S, S]; additive: 0 or the lowest finite value, in the embedding's dtype), "none". Ignored by the
            packed layout, which has none. In 4-D masks a padding position sees itself only, so no softmax is empty.
        causal: of 4-D masks: a position sees those before it, not all.
        sliding_window: of 4-D masks, as transformers counts it: causal ``0 <= q - k < w``, else ``|q - k| <= w``.
        embedding_scale: factor on token embeddings (not on prompts), for models whose embedding module has one.
        lengths: [B] on the host, the number of real tokens of each row. With it, ``prompt_offsets`` and
            ``prompt_ids`` on the host, the packed layout never waits for a GPU.
        max_prompt_length: width kept for prompts in the padded layout. None: the longest prompt of the batch.
        padding_idx: token whose embedding gets no gradient (only matters if ``embedding`` requires one).
        check: False: skip the checks that read values from a GPU. None: skip them only where this call would
            otherwise not wait for the GPU (``lengths`` or ``max_prompt_length`` given, graph capture, torch.compile).
            No check, no out-of-bounds read either: such a token becomes zeros.
        check_finite: refuse prompts that hold NaN or infinity.

    Returns:
        A :class:`PromptedBatch`: a mapping for ``model(**batch)``, with everything else as attributes. The gradient
        of ``prompts`` is summed in float32 (float64 for float64) in ascending rows: the same bits on every run.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, the rule, and the value it got.
    """
    _checks.check_tensors(input_ids, embedding, prompts, attention_mask, labels)
    _checks.check_choice("layout", layout, _checks.LAYOUTS)
    _checks.check_choice("padding_side", padding_side, _checks.SIDES)
    _checks.check_choice("mask_format", mask_format, _checks.MASK_FORMATS)
    _checks.check_numbers(causal, sliding_window, embedding_scale, max_prompt_length, padding_idx, embedding.shape[0])
    if embedding.shape[1] > 1 and embedding.stride(1) != 1:
        embedding = embedding.contiguous()
    if prompts.shape[1] > 1 and prompts.stride(1) != 1:
        prompts = prompts.contiguous()
    compiling = torch.compiler.is_compiling()
    device = input_ids.device
    rows, tokens = input_ids.shape

    waits = device.type not in ("cpu", "meta") and lengths is None and max_prompt_length is None
    offsets = _known(prompt_offsets, "prompt_offsets", layout == "packed" or max_prompt_length is None)
    if offsets is not None:
        _checks.check_offsets(offsets, prompts.shape[0])
    count = (prompt_offsets.shape[0] if isinstance(prompt_offsets, Tensor) else len(prompt_offsets)) - 1
    _checks.check_token_factors(token_factors, embedding, count)
    if prompt_ids is None and count > 1:
        raise _checks.fail("prompt_ids", f"be given, for there are {count} prompts", prompt_ids)
    ids: list[int] | None = [0 if count else -1] * rows
    if prompt_ids is not None:
        ids = _known(prompt_ids, "prompt_ids", layout == "packed" or waits)
        if ids is not None:
            _checks.check_prompt_ids(ids, rows, count)
        elif len(prompt_ids) != rows:
            raise _checks.fail("prompt_ids", f"have shape [{rows}]", prompt_ids)
    if check_finite:
        _checks.check_finite(prompts)

    device_offsets = _device(prompt_offsets, device)
    device_ids = None if prompt_ids is None else _device(prompt_ids, device)
    plan = packed = None
    distinct: list[int] = []
    real_tokens: list[int] | None = None
    if layout == "packed":
        if offsets is None or ids is None:
            raise ValueError("assemble: under torch.compile the packed layout needs prompt offsets and ids as lists")
        if lengths is not None:
            real_tokens = _host(lengths, "lengths")
            _checks.check_lengths(real_tokens, rows, tokens)
        else:
            real_tokens = [tokens] * rows if attention_mask is None else (attention_mask != 0).sum(1).tolist()
        plan, slots, segment_lengths, distinct, row_prompts = _plan(offsets, ids, real_tokens, device)
        width = max(segment_lengths, default=0)
        mask_code = 0
    else:
        width = tokens + _longest_prompt(offsets, ids, count, prompts.shape[0], max_prompt_length)
        slots = rows * width
        mask_code = _checks.MASK_FORMATS.index(mask_format)

    arguments = (
        input_ids,
        device_offsets,
        device_ids,
        attention_mask,
        labels,
        None if plan is None else plan[:-1],
        slots,
        width,
        len(distinct),
        padding_side == "left",
        mask_code,
        causal,
        sliding_window or 0,
        float(embedding_scale),
    )
    embeds, mask, positions, new_labels, token_slots, prompt_slots, row_ids, status = _run(
        prompts,
        embedding,
        None if token_factors is None else token_update(*token_factors, tokens, embedding.dtype),
        -1 if padding_idx is None else padding_idx,
        arguments,
    )
    if check is None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        check = not compiling and not capturing and (device.type == "cpu" or waits) and _checks.readable(status)
    if check:
        _checks.check_status(
            status.tolist(),
            input_ids,
            attention_mask,
            device_ids,
            embedding.shape[0],
            count,
            real_tokens,
            max_prompt_length,
        )
    if plan is not None:
        cu_seqlens = plan[:, 0].to(torch.int32)
        packed = PackedRows(segment_lengths, cu_seqlens, distinct, row_prompts, row_ids)
    return PromptedBatch(
        inputs_embeds=embeds,
        attention_mask=None if mask_code == 0 else mask,
        position_ids=positions,
        labels=None if labels is None else new_labels,
        token_slots=token_slots,
        prompt_slots=prompt_slots,
        layout=layout,
        padding_side=padding_side,
        packed=packed,
        status=status,
    )


def token_update(a: Tensor, b: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[N, U, D], what is added to the first U tokens of a row; no more of it than a row can have."""
    wide = torch.promote_types(dtype, torch.float32)
    product: Tensor = _Product.apply(a[:, :tokens].to(wide), b.to(wide))
    return product


def _run(
    prompts: Tensor, embedding: Tensor, token_update: Tensor | None, padding_idx: int, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    ops = _library.ops_for(prompts.device)
    input_ids, prompt_offsets = arguments[:2]
    rest: list[Any] = [*arguments[2:], token_update]
    if ops is None:
        if 0 <= padding_idx < embedding.shape[0] and embedding.requires_grad:
            frozen = torch.arange(embedding.shape[0], device=embedding.device)[:, None] == padding_idx
            embedding = torch.where(frozen, embedding.detach(), embedding)
        return reference.assemble(input_ids, embedding, prompts, prompt_offsets, *rest)
    if torch.is_grad_enabled() and (
        prompts.requires_grad or embedding.requires_grad or (token_update is not None and token_update.requires_grad)
    ):
        return _Assemble.apply(prompts, embedding, token_update, padding_idx, arguments)
    return ops.assemble(input_ids, embedding, prompts, prompt_offsets, *rest)


def _known(values: Tensor | Sequence[int], argument: str, needed: bool) -> list[int] | None:
    """Integers as a list if they are on the host, or needed there; None leaves them on the GPU or in the graph."""
    compiling = torch.compiler.is_compiling()
    if not isinstance(values, Tensor) or (not compiling and (needed or values.device.type == "cpu")):
        return _host(values, argument)
    _checks.check_integers(argument, values)
    return None


def _host(values: Tensor | Sequence[int], argument: str) -> list[int]:
    """Integers as a list; waits for the GPU if they are there."""
    _checks.check_integers(argument, values)
    if not isinstance(values, Tensor):
        return list(values)
    if not _checks.readable(values):
        raise _checks.fail(argument, "hold values that can be read", values)
    return values.tolist()


def _device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Integers as a contiguous int64 tensor on the device, copied without waiting."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if tensor.dtype is torch.int64 and tensor.device == device and tensor.is_contiguous():
        return tensor
    return tensor.to(device=device, dtype=torch.int64, non_blocking=True).contiguous()


def _longest_prompt(
    offsets: list[int] | None, ids: list[int] | None, count: int, prompt_rows: int, given: int | None
) -> int:
    """Width kept for prompts: the longest one that the batch uses, or, where that is not known here, of the bank."""
    if given is not None:
        return given
    if count <= 0:
        return 0
    if count == 1 and (ids is None or 0 in ids):
        return prompt_rows
    if offsets is None:
        raise ValueError(
            "assemble: `max_prompt_length` must be given under torch.compile if `prompt_offsets` is a tensor of "
            "several prompts (or give the offsets as a list)"
        )
    used = range(count) if ids is None else {n for n in ids if n >= 0}
    return max([0, *[offsets[n + 1] - offsets[n] for n in used]])


def _plan(
    offsets: list[int], ids: list[int], lengths: list[int], device: torch.device
) -> tuple[Tensor, int, list[int], list[int], list[int]]:
    """The packed layout: ``plan [G + B + 1, 4]`` (slot, length, prompt, position; the last line closes it), K, the
    lengths of all segments, the distinct prompts, and each row's place among them (-1: none)."""
    distinct = list(dict.fromkeys(n for n in ids if n >= 0))
    place = {n: g for g, n in enumerate(distinct)}
    size = {n: offsets[n + 1] - offsets[n] for n in distinct}
    lines, slot = [], 0
    for n in distinct:
        lines.append((slot, size[n], n, 0))
        slot += size[n]
    for n, length in zip(ids, lengths, strict=True):
        lines.append((slot, length, n, size.get(n, 0)))
        slot += length
    segment_lengths = [line[1] for line in lines]
    lines.append((slot, 0, -1, 0))
    plan = torch.tensor(lines, dtype=torch.int64)
    if device.type == "cuda":
        plan = plan.pin_memory()
    plan = plan.to(device, non_blocking=True)
    return plan, slot, segment_lengths, distinct, [place.get(n, -1) for n in ids]
