"""Stored prompts ranked as starting points for a task.

SPoT (Vu et al. 2022, arXiv 2110.07904) retrieves source prompts by the cosine of prompts; Su et al. (2022, arXiv
2111.06719) measure transfer by what a prompt scores on the target task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..evaluation.likelihood import Progress
from ..evaluation.prompt_scoring import score_prompts
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import usable_rows
from ..tasks.task import Task
from .similarity import mean_cosine, pairwise_cosine

NO_PROMPT = "(no prompt)"


@dataclass
class Similarity:
    """One source prompt, seen from the target task."""

    name: str
    scores: dict[str, float] | None
    """``loss`` and ``accuracy`` or ``perplexity`` on the target's rows, with 95 % intervals. None: no rows."""
    mean_cosine: float | None
    """Cosine of this prompt's mean vector and the target prompt's. None: no target prompt."""
    pairwise_cosine: float | None
    """Mean cosine over all pairs of vectors."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def similar(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task | None,
    rows: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Tensor],
    target: Tensor | None = None,
    *,
    baseline: bool = True,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Similarity]:
    """Ranks stored prompts as starting points for a task, the best first.

    With rows, the ranking is by the loss on them. Tuning minimises that loss, it orders sources of equal accuracy, and
    it needs no tuned target prompt. Without rows, the ranking is by the cosine of mean vectors (SPoT's retrieval).

    Args:
        task: how the target's rows are read. None only without rows.
        rows: labelled rows of the target; a few are enough to tell good sources from bad ones. May be empty.
        sources: [P_n, D] each, of any lengths; all run in mixed batches.
        target: [P, D], such as a prompt tuned on the target for a few steps.
        baseline: also score the model without a prompt, as ``(no prompt)``. Only with rows.

    Raises:
        ValueError: no sources, or neither rows nor a target prompt.
    """
    if not sources:
        raise ValueError("`sources` must hold at least one prompt, got none")
    if not rows and target is None:
        raise ValueError("give `rows` or `target`; without them there is nothing to compare the sources with")
    if rows and task is None:
        raise ValueError("give `task` together with `rows`; it says how they are read")
    scores: dict[str, dict[str, float]] = {}
    candidates: dict[str, Tensor | None] = dict(sources)
    if rows and task is not None:
        if baseline:
            candidates[NO_PROMPT] = None
        usable = usable_rows(task, rows)
        row_scores = score_prompts(model, tokenizer, task, usable, candidates, batch_size=batch_size, progress=progress)
        scores = {name: result.summary() for name, result in row_scores.items()}
    ranked = []
    for name, values in candidates.items():
        compared = values is not None and target is not None
        ranked.append(
            Similarity(
                name,
                scores.get(name),
                mean_cosine(values, target) if compared else None,  # type: ignore[arg-type]
                pairwise_cosine(values, target) if compared else None,  # type: ignore[arg-type]
            )
        )
    if scores:
        return sorted(ranked, key=lambda s: scores[s.name]["loss"])
    return sorted(ranked, key=lambda s: -(s.mean_cosine or 0.0))
