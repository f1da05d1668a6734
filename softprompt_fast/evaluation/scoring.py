"""Row-by-row scores of many prompts at once, in mixed batches: what ablation, pruning and transfer are made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import FastSoftPrompt
from ..tasks.collation import Collator, pad_token_id
from ..tasks.encoding import encode_target, encode_text
from ..tasks.task import Task
from .intervals import mean_interval, wilson_interval
from .predictions import Progress

logger = logging.getLogger("softprompt_fast")


@dataclass
class RowScores:
    """One prompt's scores on rows, in their order."""

    losses: Tensor
    """[rows] negative log-probability: of the right label among the labels, or of the whole response."""
    weights: Tensor
    """[rows] what a row counts in the mean: 1, or the tokens of its response."""
    predicted: Tensor | None
    """[rows] place of the likeliest label among the task's; None: a generation task."""
    correct: Tensor | None
    """[rows] boolean."""

    @property
    def loss(self) -> float:
        """As ``evaluate`` gives it: mean over rows, or over the tokens of all responses."""
        return (self.losses.sum() / self.weights.sum()).item()

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct.double().mean().item()

    def summary(self) -> dict[str, float]:
        """Loss, accuracy or perplexity, and 95 % intervals (Wilson's; none for the loss of one row)."""
        found = {"loss": self.loss, "rows": len(self.losses)}
        if len(self.losses) > 1:
            found["loss_low"], found["loss_high"] = mean_interval(self.losses, self.weights)
        if self.correct is None:
            return found | {"perplexity": math.exp(min(self.loss, 700.0))}
        hits = int(self.correct.sum())
        low, high = wilson_interval(hits, len(self.losses))
        return found | {"accuracy": hits / len(self.losses), "accuracy_low": low, "accuracy_high": high}


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

    The pairs of prompt and row stand prompt by prompt, so that a prompt runs in as few batches as may be, and a batch
    that ends one prompt begins the next.

    Args:
        prompts: [P, D] each, by any names; None or P = 0: no prompt.
        progress: called with the number of pairs done since its last call.

    Raises:
        ValueError: no rows, a row whose label the task does not know, or a prompt of another width.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none")
    bank, place = _bank(model, prompts)
    encoder_decoder = is_encoder_decoder(model.base_model)
    scorer = _Scorer(model, tokenizer, task, bank, encoder_decoder)
    texts = [encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
    targets = [encode_target(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(texts[i]))
    pairs = [(n, i) for n in range(len(prompts)) for i in order]
    losses = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    predicted = torch.zeros(len(prompts), len(rows), dtype=torch.int64)
    truth = torch.zeros(len(rows), dtype=torch.int64)
    weights = torch.ones(len(rows), dtype=torch.float64)
    classes = task.kind == "classification"
    if classes:
        truth = torch.tensor([task.labels.index(str(row[task.target_column])) for row in rows])
    else:
        weights = torch.tensor([float(len(target)) for target in targets], dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(pairs), batch_size):
            chosen = pairs[start : start + batch_size]
            at = torch.tensor(chosen)
            ids = [place[n] for n, _ in chosen]
            if classes:
                scores = scorer.labels([texts[i] for _, i in chosen], ids).log_softmax(-1)
                predicted[at[:, 0], at[:, 1]] = scores.argmax(-1)
                found = -scores.gather(-1, truth[at[:, 1]][:, None])[:, 0]
            else:
                found = -scorer.targets([texts[i] for _, i in chosen], [targets[i] for _, i in chosen], ids)
            losses[at[:, 0], at[:, 1]] = found
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(training)
    return {
        name: RowScores(losses[n], weights, predicted[n], predicted[n] == truth)
        if classes
        else RowScores(losses[n], weights, None, None)
        for n, name in enumerate(prompts)
    }


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


class _Scorer:
    """Log-probabilities of what may follow texts, on the host in float64; each row with a prompt of the bank."""

    def __init__(
        self, model: SoftPromptModel, tokenizer: Any, task: Task, bank: FastSoftPrompt, encoder_decoder: bool
    ) -> None:
        self.model, self.bank, self.encoder_decoder = model, bank, encoder_decoder
        self.collate = Collator(pad_token_id(tokenizer))
        self.words = [list(tokenizer(w, add_special_tokens=False).input_ids) for w in task.label_words.values()]

    def labels(self, texts: list[list[int]], ids: list[int]) -> Tensor:
        """[B, labels]"""
        if not self.encoder_decoder and all(len(word) == 1 for word in self.words):
            logits = self.model.next_token_logits(*self._batch(texts), torch.tensor(ids), prompts=self.bank)
            return logits.double().log_softmax(-1)[:, [word[0] for word in self.words]].cpu()
        return torch.stack([self.targets(texts, [word] * len(texts), ids) for word in self.words], 1)

    def targets(self, texts: list[list[int]], targets: list[list[int]], ids: list[int]) -> Tensor:
        """[B], of targets of any lengths, summed over their tokens."""
        prompt_ids = torch.tensor(ids)
        tokens = torch.tensor([t for target in targets for t in target], dtype=torch.int64)
        rows = torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.int64)
        steps = torch.tensor([step for target in targets for step in range(len(target))], dtype=torch.int64)
        if self.encoder_decoder:
            labels = torch.full((len(texts), max(map(len, targets))), -100)
            labels[rows, steps] = tokens
            output = self.model(
                *self._batch(texts), labels.to(self.model.device), prompt_ids, prompts=self.bank, return_logits=True
            )
            logits = output.logits[rows.to(self.model.device), steps.to(self.model.device)]
        else:
            joined = [text + target for text, target in zip(texts, targets, strict=True)]
            lengths = torch.tensor([len(text) for text in texts])
            places = torch.stack([rows, lengths[rows] + steps - 1], 1).to(self.model.device)
            logits = self.model.logits_at(*self._batch(joined), prompt_ids, places, prompts=self.bank)
        chosen = logits.float().log_softmax(-1).gather(-1, tokens.to(logits.device)[:, None])[:, 0]
        total = torch.zeros(len(texts), dtype=torch.float64)
        return total.index_add_(0, rows, chosen.double().cpu())

    def _batch(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        batch = self.collate([{"input_ids": text} for text in texts])
        return batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device)


def rank(scores: dict[str, float], by: str) -> tuple[float, ...]:
    """Larger is better."""
    if by == "accuracy" and "accuracy" in scores:
        return (scores["accuracy"], -scores["loss"])
    return (-scores["loss"],)
