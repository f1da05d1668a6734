"""Shorter prompts: vectors that do not help are removed, after XPrompt (Ma et al. 2022, arXiv 2210.04457).

XPrompt scores tokens by the gradient of a mask and retrains the remaining ones from their earlier values
("rewinding"). Here a vector's score is its ablation loss: the change of the loss on the selection rows without the
vector. Nothing is retrained. To continue tuning, start a run with the pruned prompt as ``init``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import write_atomically
from ..evaluation.likelihood import Progress
from ..evaluation.prompt_scoring import score_prompts
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.card import write_card
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..tasks.examples import Examples, usable_rows
from ..tasks.task import Task

Mask = Tensor
"""[P, pieces] boolean: the pieces of each vector that are kept. A vector without any is removed."""


@dataclass
class Pruned:
    """A shorter prompt, its scores, and the vectors that were removed."""

    prompt: Tensor
    """[P', D]"""
    kept: list[int]
    """Places of its vectors in the original prompt."""
    removed: list[int]
    """Places of the removed vectors, in the order of removal."""
    loss_changes: list[float]
    """[P], the first ablation: change of the loss on the selection rows without the vector."""
    zeroed_pieces: int
    """Pieces of kept vectors set to zero; 0 without ``pieces``."""
    selection: dict[str, dict[str, float]]
    """Scores ``before`` and ``after`` on the selection rows. Too good, because these rows decided what to remove."""
    held_out: dict[str, dict[str, float]]
    """Scores ``before`` and ``after`` on other rows."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "prompt"}

    def save(self, model: SoftPromptModel, task: Task, folder: PathLike[str] | str) -> Path:
        """Writes ``folder/<task.prompt>/`` as ``tune`` does, task included, and ``folder/pruning.json``.

        Raises:
            FileExistsError: the prompt's folder already exists.
        """
        own = Path(folder) / task.prompt
        if own.exists():
            raise FileExistsError(f"{own} already exists; choose another output folder")
        bank = FastSoftPrompt.frozen({task.prompt: self.prompt}, like=model.prompts)
        pruned = SoftPromptModel(model.base_model, bank, execution="padded", train_head=model.trains_head)
        pruned.head_modules, pruned.saves_head = model.head_modules, model.saves_head
        pruned.save_pretrained(folder)
        task.save(own)
        write_atomically(Path(folder) / "pruning.json", json.dumps(self.to_json(), indent=2) + "\n")
        write_card(own)
        return own


def prune(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    prompt: Tensor,
    selection_rows: Sequence[Mapping[str, Any]],
    held_out_rows: Sequence[Mapping[str, Any]],
    *,
    min_tokens: int = 1,
    tolerance: float = 0.0,
    rescore: bool = False,
    pieces: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Pruned:
    """Removes vectors one by one while the loss on the selection rows does not rise.

    All vectors are scored once by ablation (P prompts in mixed batches). Then they are tried in order, the least useful
    first: a vector is removed if that does not raise the loss. This takes about 2 P passes over the selection rows.

    Args:
        prompt: [P, D]; not changed.
        selection_rows: decide which vectors are removed.
        held_out_rows: other rows, scored before and after. Trust these scores.
        min_tokens: fewest vectors to keep.
        tolerance: how far the loss may rise above the lowest seen so far. 0: no removal may raise it.
        rescore: score the remaining vectors again after each removal, and try the least useful: P * P / 2 passes.
        pieces: above 1, XPrompt's second level: each kept vector is cut into this many pieces of D / pieces numbers.
            The pieces are then scored and set to zero in the same way.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    P, D = prompt.shape
    if not 1 <= min_tokens <= P:
        raise ValueError(f"`min_tokens` must be 1 to {P}, the prompt's length, got {min_tokens}")
    if pieces < 0 or (pieces > 1 and D % pieces):
        raise ValueError(f"`pieces` must divide the prompt's width {D}, got {pieces}")
    if tolerance < 0:
        raise ValueError(f"`tolerance` must not be negative, got {tolerance}")
    values = prompt.detach()
    selection, held_out = usable_rows(task, selection_rows), usable_rows(task, held_out_rows)

    def losses(masks: list[Mask]) -> list[float]:
        prompts = {str(i): apply_mask(values, mask) for i, mask in enumerate(masks)}
        scores = score_prompts(model, tokenizer, task, selection, prompts, batch_size=batch_size, progress=progress)
        return [score.loss for score in scores.values()]

    mask = torch.ones(P, max(pieces, 1), dtype=torch.bool)
    search = _Search(losses, mask, tolerance, rescore)
    whole = search.lowest
    fixed = int(task.prompt_holds_bos)  # a prompt after BOS begins with BOS's vector, which stays
    removed, first = search.eliminate([(i, slice(None)) for i in range(P)], P - min_tokens, fixed)
    zeroed: list[int] = []
    if pieces > 1:
        parts = [(i, slice(j, j + 1)) for i in range(fixed, P) if search.mask[i].any() for j in range(pieces)]
        zeroed, _ = search.eliminate(parts, len(parts), keep_vectors=True)
    mask = search.mask
    shorter = apply_mask(values, mask)

    def before_and_after(rows: Examples) -> dict[str, dict[str, float]]:
        prompts = {"before": values, "after": shorter}
        scores = score_prompts(model, tokenizer, task, rows, prompts, batch_size=batch_size)
        return {name: score.summary() for name, score in scores.items()}

    return Pruned(
        prompt=shorter.clone(),
        kept=[i for i in range(P) if mask[i].any()],
        removed=removed,
        loss_changes=[loss - whole for loss in first],
        zeroed_pieces=len(zeroed),
        selection=before_and_after(selection),
        held_out=before_and_after(held_out),
    )


def apply_mask(prompt: Tensor, mask: Mask) -> Tensor:
    """[P, D], [P, pieces] -> [P', D]: without the removed vectors; removed pieces are zero."""
    spread = mask.repeat_interleave(prompt.shape[1] // mask.shape[1], dim=1).to(prompt.device)
    return (prompt * spread)[mask.any(1).to(prompt.device)]


class _Search:
    """Removes units (vectors, or pieces of one) greedily while the loss stays near the lowest seen."""

    def __init__(
        self, losses: Callable[[list[Mask]], list[float]], mask: Mask, tolerance: float, rescore: bool
    ) -> None:
        self.losses, self.mask, self.tolerance, self.rescore = losses, mask, tolerance, rescore
        (self.lowest,) = losses([mask])

    def eliminate(
        self, units: list[tuple[int, slice]], most: int, fixed: int = 0, *, keep_vectors: bool = False
    ) -> tuple[list[int], list[float]]:
        """Removes up to ``most`` units, the least useful first.

        Args:
            fixed: the first ``fixed`` units stay.
            keep_vectors: the last piece of a vector stays.

        Returns:
            The removed units' places in ``units``, and the loss without each single unit at the start.
        """
        first = self.losses([self._cut(unit) for unit in units])
        left = dict(list(enumerate(first))[fixed:])
        removed: list[int] = []
        while left and len(removed) < most:
            candidate = min(left, key=left.__getitem__)
            loss = left.pop(candidate)
            smaller = self._cut(units[candidate])
            if keep_vectors and not smaller[units[candidate][0]].any():
                continue
            fresh = self.rescore or not removed
            if not fresh:
                (loss,) = self.losses([smaller])
            if loss > self.lowest + self.tolerance:
                if fresh:
                    break  # removing any other unit raises the loss even more
                continue
            self.mask, self.lowest = smaller, min(self.lowest, loss)
            removed.append(candidate)
            if self.rescore and left:
                left = dict(zip(left, self.losses([self._cut(units[i]) for i in left]), strict=True))
        return removed, first

    def _cut(self, unit: tuple[int, slice]) -> Mask:
        smaller = self.mask.clone()
        smaller[unit[0], unit[1]] = False
        return smaller
