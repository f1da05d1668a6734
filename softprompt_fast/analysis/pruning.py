"""Shorter prompts: vectors that do not help are removed, after XPrompt (Ma et al. 2022, arXiv 2210.04457).

XPrompt scores tokens by the gradient of a mask and retrains what is left from its earlier values ("rewinding"). Here a
vector's score is its ablation loss, what dropping it changes on the selection rows, and nothing is retrained: to go on
tuning, start a run with the pruned prompt as ``init``.
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

from ..evaluation.likelihood import Progress
from ..evaluation.prompt_scoring import score_prompts
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..tasks.examples import usable_rows
from ..tasks.task import Task

Mask = Tensor
"""[P, pieces] boolean: which pieces of which vectors are kept; a vector without any is removed."""


@dataclass
class Pruned:
    """A shorter prompt and how it came about."""

    prompt: Tensor
    """[P', D]"""
    kept: list[int]
    """Places of its vectors in the prompt it was made from."""
    removed: list[int]
    """In the order in which they went."""
    loss_changes: list[float]
    """[P], the first ablation: change of the loss on the selection rows without the vector."""
    zeroed_pieces: int
    """Pieces of kept vectors set to zero; 0 unless asked for."""
    selection: dict[str, dict[str, float]]
    """Scores ``before`` and ``after`` on the rows used for choosing: too good, for they were chosen by."""
    held_out: dict[str, dict[str, float]]
    """Scores ``before`` and ``after`` on other rows."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "prompt"}

    def save(self, model: SoftPromptModel, task: Task, folder: PathLike[str] | str) -> Path:
        """Writes ``folder/<task.prompt>/`` as ``tune`` does, task included, and ``folder/pruning.json``.

        Raises:
            FileExistsError: there is such a prompt already.
        """
        own = Path(folder) / task.prompt
        if own.exists():
            raise FileExistsError(f"{own} must not exist; choose another output folder")
        bank = FastSoftPrompt.frozen({task.prompt: self.prompt}, like=model.prompts)
        SoftPromptModel(model.base_model, bank, execution="padded").save_pretrained(folder)
        task.save(own)
        (Path(folder) / "pruning.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
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

    All vectors are scored once by ablation (P prompts in mixed batches), then tried from the least useful on: a vector
    whose removal does not raise the loss goes. That is about 2 P passes over the selection rows.

    Args:
        prompt: [P, D]; not changed.
        selection_rows: decide what goes.
        held_out_rows: others, scored before and after; what counts.
        min_tokens: vectors to keep at least.
        tolerance: how far the loss may lie above the lowest seen so far; 0: no removal may raise it.
        rescore: score what is left again after each removal and take the least useful one: P * P / 2 passes.
        pieces: above 1: XPrompt's second level. Each kept vector is cut into so many pieces of D / pieces numbers,
            which are then scored and set to zero in the same way.

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
        found = score_prompts(
            model,
            tokenizer,
            task,
            selection,
            {str(i): apply_mask(values, mask) for i, mask in enumerate(masks)},
            batch_size=batch_size,
            progress=progress,
        )
        return [scores.loss for scores in found.values()]

    mask = torch.ones(P, max(pieces, 1), dtype=torch.bool)
    search = _Search(losses, mask, tolerance, rescore)
    whole = search.lowest
    fixed = 0 if task.special_tokens else 1  # behind BOS, its vector is the first and stays
    removed, first = search.eliminate([(i, slice(None)) for i in range(P)], P - min_tokens, fixed)
    zeroed: list[int] = []
    if pieces > 1:
        parts = [(i, slice(j, j + 1)) for i in range(fixed, P) if search.mask[i].any() for j in range(pieces)]
        zeroed, _ = search.eliminate(parts, len(parts), keep_vectors=True)
    mask = search.mask
    result = apply_mask(values, mask)
    both = {"before": values, "after": result}
    scored = [
        {
            name: s.summary()
            for name, s in score_prompts(model, tokenizer, task, part, both, batch_size=batch_size).items()
        }
        for part in (selection, held_out)
    ]
    kept = [i for i in range(P) if mask[i].any()]
    return Pruned(result.clone(), kept, removed, [loss - whole for loss in first], len(zeroed), scored[0], scored[1])


def apply_mask(prompt: Tensor, mask: Mask) -> Tensor:
    """[P, D], [P, pieces] -> [P', D]: removed vectors gone, removed pieces zero."""
    spread = mask.repeat_interleave(prompt.shape[1] // mask.shape[1], dim=1).to(prompt.device)
    return (prompt * spread)[mask.any(1).to(prompt.device)]


class _Search:
    """Greedy removal of units (a vector, or a piece of one) while the loss stays near the lowest seen."""

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
            fixed: so many of the first units stay.
            keep_vectors: the last piece of a vector stays; without it the vector would be gone.

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
                    break  # the least useful one hurts: so do the others
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
