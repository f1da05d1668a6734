"""``unpack`` and ``pack`` in plain PyTorch: the oracle of the tests, and the fallback without the extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack(packed: Sequence[Tensor], table: Tensor, width: int, dtype: torch.dtype) -> list[Tensor]:
    """See :func:`softprompt_fast.ops.packing.functional.unpack`."""
    slot, held = slots_of_rows(table, width)
    return [torch.where(held[..., None, None], x[slot], 0).to(dtype) for x in packed]


def pack(rows: Sequence[Tensor], table: Tensor, slots: int, dtype: torch.dtype) -> list[Tensor]:
    """See :func:`softprompt_fast.ops.packing.functional.pack`."""
    slot, held = slots_of_rows(table, rows[0].shape[1])
    results = []
    for x in rows:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((slots, *x.shape[2:]), dtype=wide)
        if x.device.type == "cpu":
            total.index_add_(0, slot[held], x[held].to(wide))
        else:  # index_add_ is not deterministic on a GPU
            total.index_put_((slot[held],), x[held].to(wide), accumulate=True)
        results.append(total.to(dtype))
    return results


def slots_of_rows(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[B, S]: the slot at each place of each row, 0 if there is none; and whether there is one."""
    first, length, prefix_first, prefix_length = (column[:, None] for column in table.unbind(1))  # as in TableColumn
    place = torch.arange(width, device=table.device)
    in_prefix = place < prefix_length
    held = place < prefix_length + length
    slot = torch.where(in_prefix, prefix_first + place, first + place - prefix_length)
    return torch.where(held, slot, 0), held
