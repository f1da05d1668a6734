"""The public function ``assemble``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..extension.contract import AssembleCall, MaskFormat
from .autograd import run, token_update
from .batch import PackedRows, PromptedBatch
from .checks import (
    MASK_FORMATS,
    check_choices,
    check_numbers,
    check_offsets,
    check_prompt_ids,
    check_prompt_values,
    check_status,
    check_tensors,
    check_token_factors,
    fail,
    readable,
)
from .integers import kernel_integers, known_integers
from .sizes import Segments, packed_sizes, padded_sizes


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
    text is the row's real tokens, wherever the input has padding. Positions count prompt and text only, so no
    row depends on its neighbours. ``layout="packed"`` puts each distinct prompt of the batch once, then every row's
    text, into one sequence without padding.

    Args:
        input_ids: [B, T] int64 or int32. Ids at padding are never read.
        embedding: [V, D] float32, bfloat16, float16 or float64: the model's input embeddings.
        prompts: [R, D], the vectors of all prompts, concatenated; float32 or the embedding's dtype.
        prompt_offsets: [N + 1], ascending from 0 to R: prompt n is ``prompts[offsets[n]:offsets[n + 1]]``. A list of
            ints (or a CPU tensor) avoids a GPU synchronisation, and up to 64 of them a copy to the GPU.
        prompt_ids: [B], the prompt of each row, -1 for none; a list as with the offsets. Optional if there is exactly
            one prompt.
        attention_mask: [B, T] of 1 (token) and 0 (padding), any boolean, integer or float dtype. None: all ones.
        labels: [B, T] int64 or int32, moved with their tokens; -100 at prompts and padding.
        token_factors: (a [N, U, r], b [N, r, D]), float32 or the embedding's dtype: ``(a[n] @ b[n])[t]`` is added to
            the vector of real token number t, t < U, of each row of prompt n; not to later tokens, nor in rows without
            a prompt. Computed in float32 (float64 for float64), rounded once. DePT, arXiv 2309.05173.
        layout: "padded" ([B, S, D], S = longest prompt + T) or "packed" ([1, K, D]).
        padding_side: the side of the padding in the padded layout.
        mask_format: "2d" ([B, S], dtype of ``attention_mask``, int64 without one), "4d_bool" or "4d_additive"
            ([B, 1, S, S]; additive: 0 or the lowest finite value, in the embedding's dtype), "none". Ignored by the
            packed layout, which has no mask. In 4-D masks a padding position sees itself only, so no softmax is empty.
        causal: for 4-D masks: a position sees itself and earlier positions only.
        sliding_window: for 4-D masks, as transformers counts it: causal ``0 <= q - k < w``, else ``|q - k| <= w``.
        embedding_scale: factor on token embeddings (not on prompts), for models whose embedding module applies one.
        lengths: [B] on the host, the number of real tokens of each row. If these,
            ``prompt_offsets`` and ``prompt_ids`` are on the host, the packed layout never waits for a GPU.
        max_prompt_length: width kept for prompts in the padded layout. None: the longest prompt of the batch.
        padding_idx: token whose embedding gets no gradient (only matters if ``embedding`` requires one).
        check: False: skip the checks that read values from a GPU. None: skip them only if this call would
            otherwise not wait for the GPU (``lengths`` or ``max_prompt_length`` given, graph capture, torch.compile).
            Without checks an unknown token becomes zeros; nothing is read out of bounds.
        check_finite: reject prompts that contain NaN or infinity.

    Returns:
        A :class:`PromptedBatch`: a mapping for ``model(**batch)``, with everything else as attributes. The gradient
        of ``prompts`` is summed in float32 (float64 for float64) in ascending rows: the same bits on every run.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, the rule, and the value it got.
    """
    # 1. Check everything that is known on the host.
    check_tensors(input_ids, embedding, prompts, attention_mask, labels)
    check_choices(layout, padding_side, mask_format)
    check_numbers(causal, sliding_window, embedding_scale, max_prompt_length, padding_idx, embedding.shape[0])
    (rows, tokens), prompt_rows = input_ids.shape, prompts.shape[0]
    device, packed = input_ids.device, layout == "packed"
    # Without these two the sizes come from the GPU. This call then waits for it, and can check values too.
    waits = device.type not in ("cpu", "meta") and lengths is None and max_prompt_length is None
    count, offsets, ids = _read_prompts(
        prompt_offsets, prompt_ids, rows, prompt_rows, packed or max_prompt_length is None, packed or waits
    )
    check_token_factors(token_factors, embedding, count)
    if check_finite:
        check_prompt_values(prompts)

    # 2. Sizes of the output.
    if packed:
        sizes = packed_sizes(offsets, ids, input_ids, attention_mask, lengths)
    else:
        sizes = padded_sizes(rows, tokens, count, offsets, ids, prompt_rows, max_prompt_length)
    segments = sizes.segments

    # 3. Run the op: on a GPU in one launch, if the integers are few and the values are not checked.
    if check is None:
        check = _checks_by_default(input_ids, device, waits)
    few_may_stay = not torch.compiler.is_compiling() and device.type != "meta"
    if packed and token_factors is None:
        prompt_ids = None  # the plan has them; the gradient of a token update alone needs them
    # Arguments by position: keywords would slow down a small call by 2 %.
    call = AssembleCall(
        input_ids,
        _adjacent(embedding),
        _adjacent(prompts),
        kernel_integers(prompt_offsets, device, few_may_stay),
        None if prompt_ids is None else kernel_integers(prompt_ids, device, few_may_stay and token_factors is None),
        attention_mask,
        labels,
        None if segments is None else segments.plan[:-1],
        sizes.slots,
        sizes.width,
        0 if segments is None else len(segments.prompts),
        padding_side == "left",
        0 if packed else MASK_FORMATS[mask_format],
        causal,
        sliding_window or 0,
        float(embedding_scale),
        None if token_factors is None else token_update(*token_factors, tokens, embedding.dtype),
        bool(check),
    )
    outputs = run(call, -1 if padding_idx is None else padding_idx)

    # 4. Check the values that only the op has read.
    if check:
        text_lengths = None if segments is None else segments.text_lengths
        check_status(outputs[-1].tolist(), call, text_lengths, max_prompt_length)
    return _batch(call, outputs, segments, layout, padding_side)


def _batch(
    call: AssembleCall, outputs: tuple[Tensor, ...], segments: Segments | None, layout: str, padding_side: str
) -> PromptedBatch:
    embeds, mask, positions, labels, token_slots, prompt_slots, row_ids, status = outputs
    packed = None
    if segments is not None:
        packed = PackedRows(segments.lengths, segments.prompts, segments.row_prompts, row_ids, segments.plan)
    mask_or_none = None if call.mask_format == MaskFormat.NONE else mask
    labels_or_none = None if call.labels is None else labels
    return PromptedBatch(
        embeds,
        mask_or_none,
        positions,
        labels_or_none,
        token_slots,
        prompt_slots,
        layout,
        padding_side,
        packed,
        status if call.check else None,
    )


def _read_prompts(
    prompt_offsets: Tensor | Sequence[int],
    prompt_ids: Tensor | Sequence[int] | None,
    rows: int,
    prompt_rows: int,
    offsets_needed: bool,
    ids_needed: bool,
) -> tuple[int, list[int] | None, list[int] | None]:
    """The number of prompts, their offsets and each row's prompt; None for values that stay off the host."""
    offsets = known_integers(prompt_offsets, "prompt_offsets", offsets_needed)
    if offsets is not None:
        check_offsets(offsets, prompt_rows)
    count = (prompt_offsets.shape[0] if isinstance(prompt_offsets, Tensor) else len(prompt_offsets)) - 1
    if prompt_ids is None:
        if count > 1:
            raise fail("prompt_ids", f"be given because there are {count} prompts", prompt_ids)
        return count, offsets, [0 if count else -1] * rows
    ids = known_integers(prompt_ids, "prompt_ids", ids_needed)
    if ids is not None:
        check_prompt_ids(ids, rows, count)
    elif len(prompt_ids) != rows:
        raise fail("prompt_ids", f"have shape [{rows}]", prompt_ids)
    return count, offsets, ids


def _adjacent(matrix: Tensor) -> Tensor:
    """The matrix, copied if the elements of a row are not adjacent."""
    return matrix.contiguous() if matrix.stride(1) != 1 and matrix.shape[1] > 1 else matrix


def _checks_by_default(input_ids: Tensor, device: torch.device, waits: bool) -> bool:
    """Whether reading the status costs no extra wait for a GPU, and is possible at all."""
    if not (waits or device.type == "cpu") or not readable(input_ids) or torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
