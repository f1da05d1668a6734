"""The prompts that one batch uses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Selection:
    """The prompts that a batch uses, each once, and the prompt of each row."""

    prompts: list[Tensor]
    """[P_n, D] each, in the order in which rows first use them."""
    ids: list[int]
    """[B]: each row's place in ``prompts``, -1: no prompt."""
    updates: list[tuple[Tensor, Tensor] | None]
    """The factors a [U_n, r_n] and b [r_n, D] of each prompt's token update; None: it has none."""
    width: int
    """D"""

    @property
    def offsets(self) -> list[int]:
        """The first slot of each prompt in ``joined``, and the end of the last."""
        return list(accumulate((prompt.shape[0] for prompt in self.prompts), initial=0))

    @property
    def prefixes(self) -> list[tuple[int, int]]:
        """First slot and length of each row's prompt in ``joined``; (0, 0): no prompt."""
        starts = self.offsets
        return [(starts[n], starts[n + 1] - starts[n]) if n >= 0 else (0, 0) for n in self.ids]

    def joined(self, device: torch.device) -> Tensor:
        """[R, D]; a single prompt is returned as it is, without a copy."""
        if len(self.prompts) == 1:
            return self.prompts[0]
        return (
            torch.cat(self.prompts) if self.prompts else torch.empty(0, self.width, device=device, dtype=torch.float32)
        )

    def token_factors(self) -> tuple[Tensor, Tensor] | None:
        """a [N, U, r] and b [N, r, D] for ``assemble``, filled up with zeros; None: no prompt has an update."""
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

    def of_rows(self, rows: list[int]) -> Selection:
        """The selection of some of the rows."""
        used = list(dict.fromkeys(self.ids[row] for row in rows if self.ids[row] >= 0))
        ids = [used.index(self.ids[row]) if self.ids[row] >= 0 else -1 for row in rows]
        return Selection([self.prompts[n] for n in used], ids, [self.updates[n] for n in used], self.width)
