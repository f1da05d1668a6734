"""Scores of many prompts on the same rows, in mixed batches; ablation, pruning and transfer use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.modules import evaluating
from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..tasks.task import Task
from .likelihood import ModelBackend, Progress, encode_rows, label_log_probabilities, target_log_likelihoods
from .scores import RowScores


@torch.no_grad()
def score_prompts(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, Tensor | None],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, RowScores]:
    """Scores every prompt on every row through one temporary frozen bank.

    Pairs of prompt and row are ordered by prompt, so that each prompt runs in as few batches as possible. A batch that
    ends one prompt begins the next.

    Args:
        prompts: [P, D] each, by any names; None or P = 0: no prompt.
        progress: called with the number of pairs done since its last call.

    Raises:
        ValueError: no rows, a row whose label the task does not know, or a prompt of another width.
    """
    bank, place = _bank(model, prompts)
    encoded = encode_rows(task, rows, tokenizer, encoder_decoder=is_encoder_decoder(model.base_model))
    lengths = encoded.lengths
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    pairs = [(n, i) for n in range(len(prompts)) for i in order]
    table = torch.zeros(len(prompts), len(rows), len(encoded.words), dtype=torch.float64)
    losses = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    with evaluating(model):
        for start in range(0, len(pairs), batch_size):
            chosen = pairs[start : start + batch_size]
            which = torch.tensor(chosen).unbind(1)
            backend = ModelBackend(model, torch.tensor([place[n] for n, _ in chosen]), bank)
            texts = [encoded.texts[i] for _, i in chosen]
            if encoded.truth is not None:
                table[which] = label_log_probabilities(backend, texts, encoded.words)
            else:
                losses[which] = -target_log_likelihoods(backend, texts, [encoded.targets[i] for _, i in chosen])
            if progress is not None:
                progress(len(chosen))
    if encoded.truth is not None:
        return {name: RowScores.of_labels(table[n], encoded.truth) for n, name in enumerate(prompts)}
    return {name: RowScores(losses[n], encoded.weights, None, None) for n, name in enumerate(prompts)}


def _bank(model: SoftPromptModel, prompts: Mapping[str, Tensor | None]) -> tuple[FastSoftPrompt, list[int]]:
    """The prompts as a bank, and the place of each in it, -1 for none."""
    width = model.prompts.embedding_dim
    tensors: dict[str, Tensor] = {}
    place = []
    for name, values in prompts.items():
        if values is None or len(values) == 0:
            place.append(-1)
            continue
        if values.dim() != 2 or values.shape[1] != width:
            raise ValueError(f"prompt {name!r} must have shape [P, {width}] for this model, got {list(values.shape)}")
        place.append(len(tensors))
        tensors[str(len(tensors))] = values.detach().to(model.device)
    return FastSoftPrompt.frozen(tensors, like=model.prompts), place
