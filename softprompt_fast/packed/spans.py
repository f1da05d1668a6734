"""Question answering: the loss of where an answer begins, and of where it ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks.encoding import IGNORED

POSITIONS = ("start_positions", "end_positions")
LOGITS = ("start_logits", "end_logits")


def end_loss(logits: Tensor, visible: Tensor, position: Tensor, token_slots: Tensor, places: Tensor) -> Tensor:
    """The mean loss of one end of the answers. One that is no column of a text is ignored.

    Args:
        logits: [B, X]
        visible: [B, X], what takes part in the softmax: the prompt and the text. Padding does not, so that a row's loss
            does not depend on the length of others.
        position: [B], columns of ``input_ids``.
        token_slots: [B, T], -1 at padding.
        places: [B, T], the place of each column of ``input_ids`` among the X.
    """
    column = position.flatten()
    inside = (column >= 0) & (column < token_slots.shape[1])
    column = column.where(inside, 0)[:, None]
    real = inside & (token_slots.gather(1, column)[:, 0] >= 0)
    target = torch.where(real, places.gather(1, column)[:, 0], IGNORED)
    return F.cross_entropy(logits.masked_fill(~visible, torch.finfo(logits.dtype).min), target)
