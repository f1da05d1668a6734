"""NumPy's ``.npy`` files with vectors or keys and values. No pickle."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = np.lib.format.MAGIC_PREFIX
FLOATS = ("float16", "float32", "float64", "V2")
"""``V2``, two bytes without a meaning, is how NumPy stores a bfloat16 array of JAX."""


def read_npy(path: Path) -> Tensor:
    """[P, D] float32; raises as :func:`parse_npy` does."""
    return parse_npy(path.read_bytes(), str(path))


def parse_npy(content: bytes, source: str) -> Tensor:
    """[P, D] float32 of the content of a ``.npy`` file. Memory is bounded by the content, whatever its header says.

    Args:
        source: what is read, for messages.

    Raises:
        ValueError: not such a file, another shape or type, or its numbers are not finite.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format is not read")
        shape, fortran_order, dtype = readers[version](stream)
    except Exception as error:  # NumPy evaluates the header, which fails in many ways if it is damaged
        reason = str(error).split("\n")[0]
        raise ValueError(f"{source} must be a .npy file: {reason}") from error
    if len(shape) != 2 or 0 in shape or dtype.newbyteorder("=") not in map(np.dtype, FLOATS):
        raise ValueError(f"{source} must hold an array [P, D] of {', '.join(FLOATS)}, got {dtype} {list(shape)}")
    found = len(content) - stream.tell()
    if found != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{source} must hold {math.prod(shape) * dtype.itemsize} bytes of numbers, got {found}")
    array = np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran_order else "C")
    values = _bfloat16(array) if dtype.kind == "V" else torch.from_numpy(array.astype(np.float32))
    if not torch.isfinite(values).all():
        raise ValueError(f"{source} must hold finite numbers, got NaN or infinity")
    return values


def _bfloat16(array: np.ndarray[Any, Any]) -> Tensor:
    """A bfloat16 number is the upper half of a float32."""
    return torch.from_numpy((array.view("<u2").astype(np.uint32) << 16).view(np.float32))
