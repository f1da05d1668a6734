"""The training loop of the methods that ``tune`` does not train. Same schedule; it keeps the best checkpoint."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.scores import RowScores, rank


@dataclass
class Trained:
    """A finished loop: its times and its best checkpoint."""

    train_seconds: float
    """Optimiser steps only."""
    evaluation_seconds: float
    """Scoring the validation rows and keeping checkpoints."""
    steps: int
    best_step: int
    history: list[dict[str, float]]
    """Step, training loss and validation scores at each evaluation."""


def train(
    model: Any,
    step_loss: Callable[[Sequence[int]], Tensor],
    lengths: Sequence[int],
    evaluate: Callable[[], RowScores],
    keep: Callable[[], None],
    options: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> Trained:
    """Trains the parameters that require a gradient: AdamW, warm-up, then a cosine down to zero.

    Args:
        step_loss: the mean loss of the training rows with these indices.
        lengths: of all training rows, in tokens; rows of similar length share a batch.
        keep: saves the current weights. Called when they are the best so far on the validation rows.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, every = int(options["steps"]), max(1, int(options["steps"]) // int(options["evaluations"]))
    warmup = max(1, round(total * float(options["warmup"])))
    optimizer = torch.optim.AdamW(
        parameters, lr=float(options["learning_rate"]), weight_decay=float(options["weight_decay"])
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_at(step, total, warmup))
    batches = grouped_batches(lengths, batch_size, seed)
    history: list[dict[str, float]] = []
    best: tuple[float, ...] | None = None
    best_step = 0
    train_seconds = evaluation_seconds = 0.0
    losses: list[Tensor] = []
    model.train()
    start = time.perf_counter()
    for step in range(1, total + 1):
        loss = step_loss(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, float(options["max_grad_norm"]))
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % every and step != total:
            continue
        mean = torch.stack(losses).mean().item()  # waits for the device, so that the time is right
        train_seconds += time.perf_counter() - start
        if not math.isfinite(mean):
            raise FloatingPointError(f"the training loss is {mean} at step {step}; try a smaller learning rate")
        start = time.perf_counter()
        model.eval()
        scores = evaluate()
        facts = {"step": step, "train_loss": mean, "loss": scores.loss}
        if scores.accuracy is not None:
            facts["accuracy"] = scores.accuracy
        history.append(facts)
        if best is None or rank(facts, "loss") > best:
            best, best_step = rank(facts, "loss"), step
            keep()
        print(f"step {step}: {facts}", flush=True)
        model.train()
        losses = []
        evaluation_seconds += time.perf_counter() - start
        start = time.perf_counter()
    model.eval()
    optimizer.zero_grad(set_to_none=True)  # otherwise gradients would count as memory of inference
    return Trained(train_seconds, evaluation_seconds, total, best_step, history)


def schedule_at(step: int, total: int, warmup: int) -> float:
    """Share of the learning rate: linear up, then half a cosine down to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def grouped_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches, shuffled in each pass. Within groups of 50 batches, rows of similar length share a batch."""
    generator = random.Random(seed)
    while True:
        order = list(range(len(lengths)))
        generator.shuffle(order)
        batches = []
        for at in range(0, len(order), 50 * batch_size):
            group = sorted(order[at : at + 50 * batch_size], key=lambda i: -lengths[i])
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        generator.shuffle(batches)
        yield from batches
