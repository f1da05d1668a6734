"""Input checks of ``assemble``. Each message names the argument, the rule and the value it got."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..extension.contract import NO_ERROR, AssembleCall, MaskFormat, Status

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LAYOUTS = ("padded", "packed")
SIDES = ("left", "right")
# Plain ints: torch.compile hands them to the op as constants.
MASK_FORMATS = {
    "none": MaskFormat.NONE.value,
    "2d": MaskFormat.TWO_D.value,
    "4d_bool": MaskFormat.FOUR_D_BOOL.value,
    "4d_additive": MaskFormat.FOUR_D_ADDITIVE.value,
}


def describe_value(value: object) -> str:
    """A tensor as ``int64 [2, 3] on cpu``; anything else as its repr, shortened."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def fail(argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"assemble: `{argument}` must {rule}, got {describe_value(value)}")


def fail_type(argument: str, rule: str, value: object) -> TypeError:
    return TypeError(f"assemble: `{argument}` must {rule}, got {describe_value(value)}")


def _check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise fail(argument, f"be one of {', '.join(choices)}", value)


def check_choices(layout: str, padding_side: str, mask_format: str) -> None:
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("padding_side", padding_side, SIDES)
    _check_choice("mask_format", mask_format, MASK_FORMATS)


def check_numbers(
    causal: bool,
    sliding_window: int | None,
    embedding_scale: float,
    max_prompt_length: int | None,
    padding_idx: int | None,
    vocabulary: int,
) -> None:
    if causal is not True and causal is not False:
        raise fail_type("causal", "be a bool", causal)
    if not isinstance(embedding_scale, (int, float)):
        raise fail_type("embedding_scale", "be a number", embedding_scale)
    if not abs(embedding_scale) < math.inf:  # torch.compile cannot trace math.isfinite of a symbolic number
        raise fail("embedding_scale", "be finite", embedding_scale)
    _check_int("sliding_window", sliding_window, 1)
    _check_int("max_prompt_length", max_prompt_length, 0)
    _check_int("padding_idx", padding_idx, 0, vocabulary - 1)


def _check_int(argument: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if not isinstance(value, int):
        raise fail_type(argument, "be an int or None", value)
    if value < low or (high is not None and value > high):
        raise fail(argument, f"be at least {low}, or None" if high is None else f"be {low} to {high}, or None", value)


def readable(tensor: Tensor) -> bool:
    """Whether its values can be read: not a tensor on the meta device, nor a fake one that only has a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_integers(argument: str, values: object) -> None:
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise fail(argument, "be a one-dimensional tensor or list of integers", values)
        if values.dtype not in INTEGERS:
            raise fail_type(argument, "be a one-dimensional tensor or list of integers", values)
        return
    if isinstance(values, (list, tuple, range)):
        for value in values:  # a loop: `all` of a generator takes three times as long
            if not isinstance(value, int):
                break
        else:
            return
    raise fail_type(argument, "be a one-dimensional tensor or list of integers", values)


def check_tensors(
    input_ids: Tensor, embedding: Tensor, prompts: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> None:
    """Types, ranks, dtypes, shapes and devices: everything that needs no values."""
    if _usual(input_ids, embedding, prompts, attention_mask, labels):
        return
    for argument, value in (("input_ids", input_ids), ("embedding", embedding), ("prompts", prompts)):
        if not isinstance(value, Tensor):
            raise fail_type(argument, "be a tensor", value)
        if value.dim() != 2:
            shape = {"input_ids": "[B, T]", "embedding": "[V, D]", "prompts": "[R, D]"}[argument]
            raise fail(argument, f"have shape {shape}", value)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise fail_type("input_ids", "be int64 or int32", input_ids)
    if embedding.dtype not in FLOATS:
        raise fail_type("embedding", "be float32, bfloat16, float16 or float64", embedding)
    if prompts.dtype != embedding.dtype and prompts.dtype != torch.float32:
        raise fail_type("prompts", f"be float32 or have the embedding's dtype ({embedding.dtype})", prompts)
    if prompts.shape[1] != embedding.shape[1]:
        raise fail("prompts", f"have the embedding's hidden size {embedding.shape[1]}", prompts)
    if embedding.device != input_ids.device:
        raise fail("embedding", f"be on the device of input_ids ({input_ids.device})", embedding)
    if prompts.device != input_ids.device:
        raise fail("prompts", f"be on the device of input_ids ({input_ids.device})", prompts)
    if attention_mask is not None:
        _check_like(input_ids, "attention_mask", attention_mask)
        if attention_mask.dtype not in (torch.bool, *INTEGERS, *FLOATS):
            raise fail_type("attention_mask", "be bool, integer or float", attention_mask)
    if labels is not None:
        _check_like(input_ids, "labels", labels)
        if labels.dtype not in (torch.int64, torch.int32):
            raise fail_type("labels", "be int64 or int32", labels)


def check_token_factors(token_factors: object, embedding: Tensor, prompts: int) -> None:
    if token_factors is None:
        return
    rule = "be a pair of tensors a [N, U, r] and b [N, r, D], or None"
    if not isinstance(token_factors, (tuple, list)) or not all(isinstance(x, Tensor) for x in token_factors):
        raise fail_type("token_factors", rule, token_factors)
    if len(token_factors) != 2 or any(x.dim() != 3 for x in token_factors):
        raise ValueError(
            f"assemble: `token_factors` must {rule}, got {' and '.join(map(describe_value, token_factors))}"
        )
    a, b = token_factors
    for argument, factor in (("token_factors[0]", a), ("token_factors[1]", b)):
        if factor.dtype != embedding.dtype and factor.dtype != torch.float32:
            raise fail_type(argument, f"be float32 or have the embedding's dtype ({embedding.dtype})", factor)
        if factor.device != embedding.device:
            raise fail(argument, f"be on the device of input_ids ({embedding.device})", factor)
        if factor.shape[0] != prompts:
            raise fail(argument, f"have a matrix for each of the {prompts} prompts", factor)
    if b.shape[2] != embedding.shape[1]:
        raise fail("token_factors[1]", f"have the embedding's hidden size {embedding.shape[1]}", b)
    if a.shape[2] != b.shape[1]:
        raise fail("token_factors[1]", f"have the rank {a.shape[2]} of the first factor", b)


def _usual(
    input_ids: Tensor, embedding: Tensor, prompts: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> bool:
    """The common case in one expression, which is fast. The rest is checked rule by rule."""
    try:
        shape, device = input_ids.shape, input_ids.device
        embedding_shape, prompts_shape = embedding.shape, prompts.shape
        return (
            len(shape) == 2
            and input_ids.dtype is torch.int64
            and embedding.dtype in FLOATS
            and (prompts.dtype is torch.float32 or prompts.dtype is embedding.dtype)
            and len(embedding_shape) == 2
            and len(prompts_shape) == 2
            and prompts_shape[1] == embedding_shape[1]
            and embedding.device == device
            and prompts.device == device
            and (
                attention_mask is None
                or (
                    attention_mask.shape == shape
                    and attention_mask.dtype is torch.int64
                    and attention_mask.device == device
                )
            )
            and (labels is None or (labels.shape == shape and labels.dtype is torch.int64 and labels.device == device))
        )
    except AttributeError:
        return False


def _check_like(input_ids: Tensor, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise fail_type(argument, "be a tensor or None", value)
    if value.shape != input_ids.shape:
        raise fail(argument, f"have the shape of input_ids {list(input_ids.shape)}", value)
    if value.device != input_ids.device:
        raise fail(argument, f"be on the device of input_ids ({input_ids.device})", value)


def check_offsets(offsets: Sequence[int], prompt_rows: int) -> None:
    """Offsets start at 0, ascend, and end with the rows of prompts."""
    if len(offsets) == 0 or offsets[0] != 0:
        raise ValueError(f"assemble: `prompt_offsets` must start with 0, got {_short(offsets)}")
    previous = 0
    for n, offset in enumerate(offsets):
        if offset < previous:
            raise ValueError(
                f"assemble: `prompt_offsets` must ascend, got {offset} after {previous} at position {n}: "
                f"{_short(offsets)}"
            )
        previous = offset
    if previous != prompt_rows:
        raise ValueError(
            f"assemble: `prompt_offsets` must end with the rows of prompts ({prompt_rows}), got {previous}: "
            f"{_short(offsets)}"
        )


def check_prompt_ids(ids: Sequence[int], rows: int, prompts: int) -> None:
    if len(ids) != rows:
        raise ValueError(f"assemble: `prompt_ids` must name a prompt for each of the {rows} rows, got {len(ids)}")
    for row, n in enumerate(ids):
        if not -1 <= n < prompts:
            raise IndexError(
                f"assemble: `prompt_ids` must be -1 (no prompt) or 0 to {prompts - 1}, got {n} for row {row}"
            )


def check_lengths(lengths: Sequence[int], rows: int, tokens: int) -> None:
    if len(lengths) != rows:
        raise ValueError(f"assemble: `lengths` must give a length for each of the {rows} rows, got {len(lengths)}")
    for row, length in enumerate(lengths):
        if not 0 <= length <= tokens:
            raise ValueError(f"assemble: `lengths` must be 0 to T={tokens}, got {length} for row {row}")


def check_status(
    status: Sequence[int], call: AssembleCall, lengths: Sequence[int] | None, max_prompt_length: int | None
) -> None:
    """Raises for the first rule that the kernel reports as broken. ``lengths``: of the packed layout, else None."""
    if min(status) == NO_ERROR:
        return
    columns = max(call.input_ids.shape[1], 1)
    row = status[Status.BAD_PROMPT_ID]
    if row != NO_ERROR:
        value = int(call.prompt_ids[row]) if call.prompt_ids is not None else 0
        count = call.prompt_offsets.numel() - 1
        raise IndexError(
            f"assemble: `prompt_ids` must be -1 (no prompt) or 0 to {count - 1}, got {value} for row {row}"
        )
    prompt = status[Status.BAD_OFFSET]
    if prompt != NO_ERROR:
        raise ValueError(
            f"assemble: `prompt_offsets` must ascend within the rows of prompts, not so at prompt {prompt}"
        )
    mask = call.attention_mask
    if status[Status.BAD_MASK_VALUE] != NO_ERROR:
        row, column = divmod(status[Status.BAD_MASK_VALUE], columns)
        assert mask is not None
        raise ValueError(
            "assemble: `attention_mask` must hold 1 for tokens and 0 for padding, "
            f"got {mask[row, column].item()} at row {row}, column {column}"
        )
    row = status[Status.BAD_LENGTH]
    if row != NO_ERROR and lengths is not None:
        real = columns if mask is None else int((mask[row] != 0).sum())
        raise ValueError(
            f"assemble: `lengths` must count the real tokens of each row, {real} in row {row}, got {lengths[row]}"
        )
    if row != NO_ERROR:
        raise ValueError(
            "assemble: `max_prompt_length` must be at least the length of every prompt in use, "
            f"got {max_prompt_length}, too little for row {row}"
        )
    row, column = divmod(status[Status.BAD_TOKEN_ID], columns)
    raise IndexError(
        f"assemble: `input_ids` must be 0 to {call.embedding.shape[0] - 1}, "
        f"got {int(call.input_ids[row, column])} at row {row}, column {column}"
    )


def check_prompt_values(prompts: Tensor) -> None:
    bad = (~torch.isfinite(prompts)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"assemble: `prompts` must be finite, got {prompts[row, column].item()} at row {row}, column {column} "
            f"({len(bad)} such values)"
        )


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"
