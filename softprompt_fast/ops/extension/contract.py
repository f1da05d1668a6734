"""The agreement of Python with the C++ code: the arguments of the ``assemble`` op and the orders of its enums.

A test compares both with what the built extension reports.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

NO_ERROR = 2**63 - 1
"""A field of ``status`` whose rule holds everywhere."""
FEW_INTEGERS = 64
"""As many offsets or ids of prompts may stay on the host: they go to a kernel with its arguments."""


class MaskFormat(IntEnum):
    """``MaskFormat`` of csrc/params.h."""

    NONE = 0
    TWO_D = 1
    FOUR_D_BOOL = 2
    FOUR_D_ADDITIVE = 3


class Status(IntEnum):
    """Fields of ``status``: the smallest index that breaks a rule, or NO_ERROR. ``Status`` of csrc/params.h."""

    BAD_TOKEN_ID = 0
    BAD_PROMPT_ID = 1
    BAD_MASK_VALUE = 2
    BAD_LENGTH = 3
    BAD_OFFSET = 4


class PlanColumn(IntEnum):
    """Columns of the packed layout's plan, one line a segment. ``PlanColumn`` of csrc/params.h."""

    SLOT = 0
    LENGTH = 1
    PROMPT = 2
    POSITION = 3


class TableColumn(IntEnum):
    """Columns of a table of rows or segments, for packing and attention. ``TableColumn`` of csrc/params.h."""

    OWN_SLOT = 0
    OWN_LENGTH = 1
    PREFIX_SLOT = 2
    PREFIX_LENGTH = 3


class AssembleCall(NamedTuple):
    """Arguments of the ``assemble`` op, in the order of its schema (csrc/ops.cpp): ``op(*call)``.

    B rows, T tokens, V vocabulary, D hidden size, N prompts, R prompt rows, U tokens that an update reaches.
    """

    input_ids: Tensor
    """[B, T] int64 or int32."""
    embedding: Tensor
    """[V, D], elements of a row adjacent."""
    prompts: Tensor
    """[R, D] float32 or the embedding's dtype, elements of a row adjacent."""
    prompt_offsets: Tensor
    """[N + 1] int64; on the device, or on the host if there are at most FEW_INTEGERS."""
    prompt_ids: Tensor | None
    """[B] int64, where the offsets may be; None: prompt 0 everywhere, or none if there is no prompt. Packed, only the
    gradient of ``token_update`` needs them."""
    attention_mask: Tensor | None
    """[B, T]"""
    labels: Tensor | None
    """[B, T] int64 or int32."""
    plan: Tensor | None
    """[segments, 4] int64 with the columns of :class:`PlanColumn`; None: padded layout."""
    slots: int
    """Vectors of the output: B * S padded, K packed."""
    width: int
    """S padded; the longest segment packed."""
    prompt_segments: int
    """0 padded; the number of distinct prompts packed."""
    left: bool
    """Padding on the left."""
    mask_format: int
    """A value of :class:`MaskFormat`."""
    causal: bool
    window: int
    """0: none."""
    scale: float
    """Factor on token embeddings."""
    token_update: Tensor | None = None
    """[N, U, D] float64 if the embedding is, else float32."""
    check: bool = True
    """Whether ``status`` is written. If not, it is empty."""
