"""The training loop of a prepared run: transformers' Trainer, its arguments, and the evaluations during the run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..evaluation.predictions import evaluate
from ..evaluation.scores import main_score
from ..tasks.collation import Collator, pad_token_id
from ..tasks.cuts import counting_cuts
from .best import BestPrompts
from .preparation import Prepared, lengths_of
from .progress import RichProgress
from .record import seconds_in, step_of
from .results import Outcome
from .sampler import TaskSampler
from .settings import DEFAULT_STEPS
from .trainer import GracefulStop, PromptTrainer


def run(prepared: Prepared, report_to: Sequence[str], callbacks: Sequence[Any]) -> Outcome:
    """Trains the prompts to the last step, or until Ctrl-C."""
    evaluation = Evaluation(prepared)
    stop = GracefulStop(prepared.console)
    trainer = build_trainer(prepared, evaluation, stop, report_to, callbacks)
    trainer.accelerator.wait_for_everyone()  # all processes have seen whether there is a run
    if prepared.checkpoint is None and trainer.is_world_process_zero():
        prepared.record.start(prepared.facts)
    steps = step_of(prepared.checkpoint)
    start = time.perf_counter()
    if steps >= trainer.args.max_steps:
        prepared.console.print(f"already finished at step {steps}")
    else:
        try:
            trainer.train(resume_from_checkpoint=prepared.checkpoint)
        finally:
            stop.restore()
        steps = trainer.state.global_step
        evaluations = evaluation.history[0]
        if not evaluations or evaluations[-1]["step"] != steps:
            evaluation(steps, trainer.tuning_seconds())
    return Outcome(
        best=evaluation.best,
        history=evaluation.history,
        seconds=time.perf_counter() - start,
        evaluation_seconds=trainer.evaluation_seconds,
        steps=steps,
        interrupted=stop.requested,
        main_process=trainer.is_world_process_zero(),
    )


class Evaluation:
    """Scores every prompt, keeps the best values of each, and writes the scores down."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.best = BestPrompts(prepared.model, prepared.record.folder / "best", prepared.settings.best_by)
        self.history = prepared.record.history(prepared.names, prepared.checkpoint)
        self.seconds_before = seconds_in(self.history)

    @counting_cuts(log=False)  # counted once, when the rows were encoded
    def __call__(self, step: int, seconds: float) -> dict[str, float]:
        """The scores of one prompt; of several, the means under plain names, for Trainer and the progress bar.

        Args:
            seconds: spent on tuning, without evaluations, since this run or its resumption started.
        """
        jobs, names = self.prepared.jobs, self.prepared.names
        every = []
        for job, name, history in zip(jobs, names, self.history, strict=True):
            scores = (
                evaluate(
                    self.prepared.model,
                    self.prepared.tokenizer,
                    job.task,
                    job.held_out_rows,
                    batch_size=self.prepared.settings.batch_size,
                    prompt=name,
                )
                if job.scorer is None
                else job.scorer(name)
            )
            if not math.isfinite(scores["loss"]):
                raise FloatingPointError(
                    f"the held-out loss of {name!r} is {scores['loss']} at step {step}; try a smaller `learning_rate`"
                )
            every.append(scores)
            history.append({"step": step, "seconds": self.seconds_before + seconds} | scores)
            self.best.update(name, scores, step)
        self.prepared.record.write_history(names, self.history)
        if len(every) == 1:
            return every[0]
        shown = {key: sum(s[key] for s in every) / len(every) for key in every[0] if all(key in s for s in every)}
        for name, scores in zip(names, every, strict=True):
            shown |= {f"{name}_{key}": scores[key] for key in ("accuracy", "loss") if key in scores}
        return shown


def build_trainer(
    prepared: Prepared,
    evaluation: Evaluation,
    stop: GracefulStop,
    report_to: Sequence[str],
    callbacks: Sequence[Any],
) -> PromptTrainer:
    """The trainer of a run, with a progress bar and early stopping."""
    model, settings = prepared.model, prepared.settings
    sampler = TaskSampler(
        [lengths_of(prepared.features, name) for name in prepared.names],
        settings.batch_size,
        settings.seed,
        by_length=model.execution_report().execution == "padded",
    )
    arguments = training_arguments(prepared, report_to, len(sampler))
    if model.device.type == "cuda" and model.device != arguments.device:
        raise ValueError(
            f"`model` must be on {arguments.device}, where Trainer runs, got {model.device}; "
            "CUDA_VISIBLE_DEVICES chooses another GPU"
        )
    trainer = PromptTrainer(
        model,
        arguments,
        data_collator=Collator(pad_token_id(prepared.tokenizer)),
        train_dataset=prepared.features,
        eval_dataset=prepared.features[:1],  # scored by the evaluator instead
        evaluator=evaluation,
        losses=prepared.losses,
        update_learning_rate=settings.token_update_learning_rate,
        head_learning_rate=settings.head_learning_rate,
        sampler=sampler,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(stop)
    trainer.add_callback(RichProgress(prepared.console, lambda: trainer.tokens_seen))
    if settings.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def training_arguments(prepared: Prepared, report_to: Sequence[str], rows_per_epoch: int) -> TrainingArguments:
    """Trainer's arguments for the settings of a run."""
    settings, prompts = prepared.settings, len(prepared.jobs)
    rows = settings.batch_size * prompts
    per_epoch = -(-rows_per_epoch // (rows * settings.gradient_accumulation_steps))
    total = settings.steps or (round(per_epoch * settings.epochs) if settings.epochs else DEFAULT_STEPS) or 1
    every = settings.eval_every or max(1, total // 5)
    on_cpu = prepared.model.device.type == "cpu"
    names = [main_score(scores) for scores in prepared.before]
    metric = "loss" if settings.best_by == "loss" or None in names else str(names[0])
    arguments = TrainingArguments(
        output_dir=str(prepared.record.folder),
        max_steps=total,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim={"adamw": "adamw_torch", "adafactor": "adafactor"}[settings.optimizer],
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=total // 20,
        weight_decay=settings.decay_to_initial,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric != "loss",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_first_step=True,
        logging_steps=max(1, min(10, total // 10)),
        report_to=list(report_to) or "none",
        seed=settings.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=prompts > 1,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer's DataParallel cannot split lists; torchrun is for several
    return arguments
