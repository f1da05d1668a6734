"""Trains a prompt on the teacher's probabilities."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ..base.modules import without_gradients
from ..base.precision import float32_products
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.placement import freeze_first
from ..tasks.collation import Collator
from ..tasks.encoding import IGNORED
from .divergence import DistillationLoss
from .settings import DistillationSettings
from .teacher import Target, Teacher

LINES = 5
"""Lines that a training prints."""


@dataclass(frozen=True)
class TrainingRun:
    """How a training went."""

    losses: list[float]
    """Divergence per token of each step's batch."""
    learning_rate: float
    seconds: float


def batch_loss(
    student: SoftPromptModel, prompt: str, targets: Sequence[Target], temperature: float, *, reverse: bool = False
) -> Tensor:
    """The mean divergence of teacher and student per token of a batch, a scalar.

    Args:
        prompt: of the targets that do not name theirs.
    """
    features = [
        {
            "input_ids": target.query + target.continuation,
            "labels": [IGNORED] * len(target.query) + target.continuation,
        }
        for target in targets
    ]
    batch = Collator(0)(features)
    loss: Tensor = student(
        batch["input_ids"].to(student.device),
        batch["attention_mask"].to(student.device),
        batch["labels"].to(student.device),
        [target.front or prompt for target in targets],
        lengths=batch["lengths"],
        num_targets=batch["num_targets"],
        return_logits=False,
        loss_function=DistillationLoss(
            torch.cat([target.top_ids for target in targets]),
            torch.cat([target.log_probabilities for target in targets]),
            temperature,
            reverse,
        ),
    ).loss
    return loss


def batches(targets: Sequence[Target], settings: DistillationSettings) -> Iterator[list[Target]]:
    """Batches without end. Every epoch has its own order, which depends on the seed alone."""
    size, epoch = min(settings.batch_size, len(targets)), 0
    while True:
        order = list(range(len(targets)))
        random.Random(f"{settings.seed} {epoch}").shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield [targets[i] for i in order[start : start + size]]
        epoch += 1


def train_prompts(
    student: SoftPromptModel,
    prompts: Sequence[str],
    targets: Sequence[Target],
    teacher: Teacher | None,
    settings: DistillationSettings,
    init: str,
    console: Console,
) -> TrainingRun:
    """Trains prompts of the student in place.

    Args:
        prompts: the first is that of the targets that do not name theirs.
        teacher: None: a forward divergence does not need it.
        init: the kind of the prompts' initial values.

    Raises:
        ValueError: the loss is not finite any more.
    """
    parameters = [freeze_first(student.prompts, name, int(settings.keep_first)) for name in prompts]
    # Another object over the same model may train its adapters: their gradients are not ours.
    others = list(student.base_model.parameters())
    rate = settings.rate_from(init)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    prompt, shown = prompts[0], ", ".join(prompts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _share_of_rate(done, settings.steps))
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in zip(range(1, settings.steps + 1), batches(targets, settings), strict=False):
        parts = [] if settings.divergence == "reverse" else [(batch, False)]
        if settings.divergence != "forward":
            assert teacher is not None
            drawn = teacher.judged(student, prompt, [one.query for one in batch], settings.seed + step)
            parts.append((drawn, True))
        with float32_products(settings.matmul_precision), without_gradients(others):
            found = [
                batch_loss(student, prompt, some, settings.temperature, reverse=reverse) for some, reverse in parts
            ]
            loss = torch.stack(found).mean()
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        losses.append(loss.item())
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise ValueError(
                f"the loss and its gradient must be finite, got a loss of {losses[-1]} and a gradient norm of "
                f"{norm.item()} in step {step}; use a smaller `learning_rate`"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, settings.steps // LINES) == 0:
            seconds = time.perf_counter() - start
            console.print(
                f"{shown}: step {step}/{settings.steps}, loss {losses[-1]:.3f}, {seconds:.0f} s", highlight=False
            )
    return TrainingRun(losses, rate, time.perf_counter() - start)


def _share_of_rate(done: int, steps: int) -> float:
    """The learning rate after `done` steps: a warm-up over a twentieth of the steps, then a cosine to 0."""
    warm = steps // 20
    if done < warm:
        return (done + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))
