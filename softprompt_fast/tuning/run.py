"""The main job, start to end: a frozen model, rows, a task -> a tuned prompt on disk with its scores."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from ..architecture import is_encoder_decoder
from ..model import SoftPromptModel
from ..task import Task
from .data import Collator, Rows, encode, pad_token_id
from .evaluation import evaluate

logger = logging.getLogger("softprompt_fast")

# Chosen on movie-review sentiment with SmolLM2-135M; what each is worth is a later chapter's subject.
LEARNING_RATE = 1e-2
VIRTUAL_TOKENS = 20


@dataclass
class TuningResult:
    """What came of a run."""

    folder: Path
    """The prompt's own folder."""
    before: dict[str, float]
    """Held-out scores of the model without a prompt."""
    after: dict[str, float]
    """Held-out scores with the best prompt."""
    tuning_seconds: float
    """Time spent in the loop, its evaluations included."""
    steps: int
    interrupted: bool


def tune(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Rows,
    held_out_rows: Rows,
    output: PathLike[str] | str,
    *,
    num_virtual_tokens: int | None = None,
    init: str | PathLike[str] = "vocabulary",
    init_text: str | None = None,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    epochs: float = 3.0,
    steps: int | None = None,
    eval_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    report_to: Sequence[str] = (),
    console: Console | None = None,
) -> TuningResult:
    """Tunes ``task.prompt``, keeps the best of its checkpoints, and saves it with its task and scores.

    Leaves in ``output``: ``<prompt>/`` (PEFT adapter folder and ``task.json``), ``metrics.json`` and ``checkpoints/``.

    Args:
        num_virtual_tokens: None: 20, or as many as ``init`` brings.
        init: as in :meth:`FastSoftPrompt.add_prompt`.
        steps: optimiser steps; None: ``epochs`` passes over the rows.
        eval_every: steps between evaluations, which also decide what is best; None: five per run.
        seed: of the initialisation and the order of rows: the same seed gives the same prompt.
        resume: go on from the last checkpoint in ``output``.
        report_to: of transformers, such as ("tensorboard",).

    Raises:
        FileNotFoundError: ``resume`` without a checkpoint.
        FileExistsError: ``output`` already has this prompt, and ``resume`` was not asked for.
    """
    from transformers import TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.trainer_utils import get_last_checkpoint

    from .trainer import GracefulStop, PromptTrainer, RichProgress

    console = console or Console(stderr=True)
    output = Path(output)
    checkpoints = output / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if resume and last is None:
        raise FileNotFoundError(f"nothing to resume: {checkpoints} holds no checkpoint")
    if not resume and (last is not None or (output / task.prompt).exists()):
        raise FileExistsError(f"{output} already holds a run; resume it, or choose another output folder")
    output.mkdir(parents=True, exist_ok=True)

    encoder_decoder = is_encoder_decoder(model.base_model)
    features = encode(task, train_rows, tokenizer, encoder_decoder=encoder_decoder)
    before = evaluate_bare(model, tokenizer, task, held_out_rows, batch_size)
    console.print(f"without a prompt: {describe(before)}")
    set_seed(seed)
    if task.prompt not in model.prompts:
        if num_virtual_tokens is None and init in ("random", "vocabulary", "class_labels"):
            num_virtual_tokens = VIRTUAL_TOKENS
        model.add_prompt(
            task.prompt,
            num_virtual_tokens,
            init=init,
            init_text=init_text,
            class_labels=list(task.label_words.values()),
            tokenizer=tokenizer,
            seed=seed,
        )

    per_epoch = -(-len(features) // (batch_size * gradient_accumulation_steps))
    total = steps if steps is not None else max(1, round(per_epoch * epochs))
    every = eval_every or max(1, total // 5)
    accuracy = task.kind == "classification"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=total,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, total // 20),
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy" if accuracy else "loss",
        greater_is_better=accuracy,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=max(1, min(10, total // 10)),
        report_to=list(report_to) or "none",
        seed=seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
    )
    trainer = PromptTrainer(
        model,
        arguments,
        data_collator=Collator(pad_token_id(tokenizer)),
        train_dataset=features,
        eval_dataset=held_out_rows,
        evaluator=lambda: evaluate(model, tokenizer, task, held_out_rows, batch_size=batch_size),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    stop = GracefulStop(console)
    trainer.add_callback(stop)
    trainer.add_callback(RichProgress(console, lambda: trainer.tokens_seen))

    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=last if resume else None)
    finally:
        stop.restore()
    seconds = time.perf_counter() - start

    after = evaluate(model, tokenizer, task, held_out_rows, batch_size=batch_size)
    model.save_pretrained(output, [task.prompt])
    task.save(output / task.prompt)
    result = TuningResult(output / task.prompt, before, after, seconds, trainer.state.global_step, stop.requested)
    metrics = {"before": before, "after": after, "tuning_seconds": seconds, "steps": result.steps, "seed": seed}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    console.print(f"with the prompt: {describe(after)}; saved in {result.folder}")
    return result


def evaluate_bare(model: SoftPromptModel, tokenizer: Any, task: Task, rows: Rows, batch_size: int) -> dict[str, float]:
    """Scores of the model without any prompt in front."""
    return evaluate(SoftPromptModel(model.base_model), tokenizer, task, rows, batch_size=batch_size)


def describe(scores: dict[str, float]) -> str:
    """Scores in words."""
    if "accuracy" in scores:
        low, high = scores["accuracy_low"], scores["accuracy_high"]
        return f"accuracy {scores['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {scores['rows']:.0f} rows)"
    return f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f} ({scores['rows']:.0f} rows)"
