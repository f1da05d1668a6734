"""Facts about a prompt: its neighbours in the vocabulary, its norms, and the effect of each vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..evaluation.intervals import Z, mean_and_error
from ..evaluation.likelihood import Progress
from ..evaluation.prompt_scoring import score_prompts
from ..evaluation.scores import RowScores
from ..hf.embedding import embedding_table
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.examples import usable_rows
from ..tasks.task import Task
from .similarity import between_prompts, token_cosines

CAVEAT = (
    "Nearest tokens are not an explanation: prompts that solve a task equally well can be found next to arbitrary, "
    'even unrelated, text (Khashabi et al. 2022, "Prompt Waywardness", arXiv 2112.08348).'
)
CHUNK = 16384
"""Vocabulary rows compared at a time."""


@dataclass
class Neighbour:
    """A vocabulary token near a prompt's vector."""

    id: int
    token: str
    value: float
    """Cosine, or Euclidean distance."""


@dataclass
class Reading:
    """One prompt compared with the vocabulary; P entries each."""

    cosine: list[list[Neighbour]]
    """For each vector the nearest tokens by cosine, nearest first."""
    euclidean: list[list[Neighbour]]
    norms: list[float]
    norm_ranks: list[float]
    """Share of the vocabulary with a smaller norm."""
    token_cosines: list[list[float]]
    """[P, P]"""


@dataclass
class Ablation:
    """The effect of dropping each vector, on rows. Vectors act together, so changes do not add up."""

    prompt: str
    rows: int
    loss: float
    """With the whole prompt."""
    accuracy: float | None
    loss_change: list[float]
    """[P], positive: the vector helps."""
    loss_change_half_width: list[float]
    """[P], of the 95 % interval, from the differences row by row."""
    accuracy_change: list[float] | None
    """[P], negative: the vector helps."""


@dataclass
class Interpretation:
    """The result of :func:`interpret`."""

    caveat: str
    prompts: dict[str, Reading]
    vocabulary_norms: dict[str, float]
    """Quantiles of the vocabulary's norms."""
    mean_cosine: list[list[float]]
    """[N, N] between prompts: cosine of mean vectors."""
    aligned_cosine: list[list[float]]
    """[N, N] between prompts: mean cosine of vectors at the same places, up to the shorter prompt's length."""
    ablation: Ablation | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interpret(
    model: SoftPromptModel,
    tokenizer: Any,
    prompts: Mapping[str, Tensor],
    *,
    k: int = 5,
    task: Task | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    ablate: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Interpretation:
    """Compares prompts with the vocabulary and with each other. With rows, measures the effect of each vector.

    Args:
        prompts: [P_n, D] each, such as ``model.prompts``' parameters.
        k: neighbours per vector; at most as many as there are tokens.
        task, rows: held-out rows on which vectors are dropped one at a time. Without rows nothing is dropped.
        ablate: the prompt whose vectors are dropped. None: the only one.

    Raises:
        ValueError: no prompts, an unknown ``ablate``, rows without a task.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none")
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}")
    vectors = _vocabulary(model, tokenizer)
    norms = _norms(vectors)
    readings = {name: _read(tokenizer, values, vectors, norms, k) for name, values in prompts.items()}
    means, aligned = between_prompts(list(prompts.values()))
    effects = None
    if rows:
        if task is None:
            raise ValueError("give `task` together with `rows`; it says how they are read")
        name = _only(prompts) if ablate is None else ablate
        if name not in prompts:
            raise ValueError(f"`ablate` must be one of {list(prompts)}, got {name!r}")
        effects = ablation(model, tokenizer, task, rows, name, prompts[name], batch_size=batch_size, progress=progress)
    levels = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    quantiles = np.quantile(norms.numpy(), list(levels.values())).tolist()  # torch's refuses large vocabularies
    return Interpretation(
        CAVEAT, readings, dict(zip(levels, quantiles, strict=True)), means.tolist(), aligned.tolist(), effects
    )


def ablation(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    prompt: Tensor,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Ablation:
    """Scores the prompt and its P shortened versions, all in mixed batches."""
    usable = usable_rows(task, rows)
    scores = score_prompts(
        model,
        tokenizer,
        task,
        usable,
        {"whole": prompt} | {str(i): without(prompt, i) for i in range(len(prompt))},
        batch_size=batch_size,
        progress=progress,
    )
    whole = scores.pop("whole")
    changes = [_change(whole, shortened) for shortened in scores.values()]
    accuracy = whole.accuracy
    return Ablation(
        name,
        len(usable),
        whole.loss,
        accuracy,
        [change for change, _ in changes],
        [half for _, half in changes],
        None if accuracy is None else [(s.accuracy or 0.0) - accuracy for s in scores.values()],
    )


def without(prompt: Tensor, i: int) -> Tensor:
    """[P, D] -> [P - 1, D]"""
    return torch.cat([prompt[:i], prompt[i + 1 :]])


def _change(whole: RowScores, shortened: RowScores) -> tuple[float, float]:
    """The change of the loss and half its 95 % interval; rows are compared with themselves."""
    differences = shortened.losses - whole.losses
    if len(differences) < 2:
        return (differences.sum() / whole.weights.sum()).item(), 0.0
    mean, error = mean_and_error(differences, whole.weights)
    return mean, Z * error


def _only(prompts: Mapping[str, Tensor]) -> str:
    if len(prompts) != 1:
        raise ValueError(f"`ablate` must be one of {list(prompts)}, got None")
    return next(iter(prompts))


def _vocabulary(model: SoftPromptModel, tokenizer: Any) -> Tensor:
    """[V, D] as the model sees them. Rows after the tokenizer's last token are padding of the table."""
    table = embedding_table(model.get_input_embeddings())
    count = min(len(tokenizer), table.weight.shape[0])
    return table(torch.arange(count, device=table.weight.device)).detach()


def _norms(vectors: Tensor) -> Tensor:
    """[V] float32, on the host."""
    return torch.cat([part.float().norm(dim=1).cpu() for part in vectors.split(CHUNK)])


def _read(tokenizer: Any, prompt: Tensor, vectors: Tensor, norms: Tensor, k: int) -> Reading:
    values = prompt.detach().float().to(vectors.device)
    directions = normalize(values, dim=1)
    best = [torch.empty(len(values), 0), torch.empty(len(values), 0)]
    ids = [torch.empty(len(values), 0, dtype=torch.int64) for _ in best]
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].float()
        near = (directions @ normalize(part, dim=1).T, -torch.cdist(values, part))
        for which, scores in enumerate(near):
            joined = torch.cat([best[which], scores.cpu()], 1)
            places = torch.arange(start, start + len(part)).expand(len(values), -1)
            known = torch.cat([ids[which], places], 1)
            best[which], order = joined.topk(min(k, joined.shape[1]), dim=1)
            ids[which] = known.gather(1, order)
    own = values.norm(dim=1).cpu()
    return Reading(
        _neighbours(tokenizer, ids[0], best[0]),
        _neighbours(tokenizer, ids[1], -best[1]),
        own.tolist(),
        [(norms < norm).double().mean().item() for norm in own],
        token_cosines(prompt, prompt).tolist(),
    )


def _neighbours(tokenizer: Any, ids: Tensor, values: Tensor) -> list[list[Neighbour]]:
    return [
        [Neighbour(i, tokenizer.decode([i]), value) for i, value in zip(row, near, strict=True)]
        for row, near in zip(ids.tolist(), values.tolist(), strict=True)
    ]
