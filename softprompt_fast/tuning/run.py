"""The main job, start to end: a frozen model, rows, a task -> a tuned prompt on disk with its scores.

Several jobs run in one loop: each step is a mixed batch of rows of all of them, each behind its own prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..architecture import is_encoder_decoder
from ..deep_prompt import DeepPromptModel
from ..model import SoftPromptModel
from ..reparameterize import fold
from ..task import Task
from .best import BestPrompts
from .data import Collator, Rows, encode, pad_token_id
from .evaluation import evaluate
from .objective import choose_loss
from .prepare import add_prompt, set_form
from .settings import DEFAULT_STEPS, TuningSettings

METRICS = "metrics.json"


@dataclass
class TuningJob:
    """One prompt to tune."""

    task: Task
    """``task.prompt`` is the prompt's name."""
    train_rows: Rows
    held_out_rows: Rows
    settings: TuningSettings | None = None
    """Of its first values; None: the run's."""
    scorer: Callable[[str | None], dict[str, float]] | None = None
    """Gives the held-out scores of the prompt of a name, None: of no prompt, in place of :func:`evaluate`."""


@dataclass
class TuningResult:
    """What came of a run."""

    folder: Path
    """The prompt's own folder."""
    before: dict[str, float]
    """Held-out scores of the model without a prompt."""
    after: dict[str, float]
    """Held-out scores with the best prompt; it was chosen by them, so they are a little too good."""
    tuning_seconds: float
    """Time spent in the loop, its evaluations included."""
    evaluation_seconds: float
    """Time of those evaluations."""
    steps: int
    best_step: int
    interrupted: bool
    history: list[dict[str, float]]
    """``step``, ``seconds`` of tuning without evaluations, and scores, of each evaluation."""


def tune(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Rows,
    held_out_rows: Rows,
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    **changes: Any,
) -> TuningResult:
    """Tunes ``task.prompt``, keeps the best of its states, and saves it with its task and scores.

    Leaves in ``output``: ``<prompt>/`` (PEFT adapter folder and ``task.json``), ``metrics.json`` and ``checkpoints/``.

    Args:
        model: plain prompts, or a :class:`DeepPromptModel`. A prompt of the task's name that it has is tuned further.
        held_out_rows: scored during the run; they decide which state is best.
        resume: go on from the last checkpoint in ``output``.
        report_to: of transformers, such as ("tensorboard",).
        callbacks: more of transformers' ``TrainerCallback``.
        changes: settings by name, such as ``learning_rate=3e-3``.

    Raises:
        FileNotFoundError: ``resume`` without a checkpoint.
        FileExistsError: ``output`` already has this prompt, and ``resume`` was not asked for.
    """
    jobs = [TuningJob(task, train_rows, held_out_rows)]
    (result,) = tune_tasks(
        model,
        tokenizer,
        jobs,
        output,
        settings,
        resume=resume,
        report_to=report_to,
        callbacks=callbacks,
        console=console,
        **changes,
    )
    return result


def tune_tasks(
    model: SoftPromptModel,
    tokenizer: Any,
    jobs: Sequence[TuningJob],
    output: PathLike[str] | str,
    settings: TuningSettings | None = None,
    *,
    shared_tokens: int = 0,
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    **changes: Any,
) -> list[TuningResult]:
    """Tunes several prompts at once, one per job, in mixed batches; each keeps its own best state.

    A step takes ``batch_size`` rows of each job on average; jobs with fewer rows see theirs more often.

    Args:
        shared_tokens: vectors that all prompts have in common at their start and train together; each saved prompt
            holds them in front of its own.

    Other arguments, files and errors as of :func:`tune`.
    """
    settings = (settings or TuningSettings()).with_changes(changes)
    names = [job.task.prompt for job in jobs]
    if not jobs or len(set(names)) != len(names):
        raise ValueError(f"`jobs` must be one or more with prompts of different names, got {names}")
    run = _Run(model, tokenizer, list(jobs), Path(output), settings, console or Console(stderr=True))
    last = run.last_checkpoint(resume)
    run.prepare(shared_tokens)
    return run.tune(last, report_to, callbacks)


class _Run:
    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any,
        jobs: list[TuningJob],
        output: Path,
        settings: TuningSettings,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.jobs, self.output = model, tokenizer, jobs, output
        self.settings, self.console = settings, console
        self.checkpoints = output / "checkpoints"
        of_labels = all(job.task.kind == "classification" for job in jobs)
        self.metric = settings.best_by if of_labels else "loss"
        self.before: list[dict[str, float]] = []

    def last_checkpoint(self, resume: bool) -> str | None:
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None
        if resume and last is None:
            raise FileNotFoundError(f"nothing to resume: {self.checkpoints} holds no checkpoint")
        if not resume and (last is not None or any((self.output / job.task.prompt).exists() for job in self.jobs)):
            raise FileExistsError(f"{self.output} already holds a run; resume it, or choose another output folder")
        self.output.mkdir(parents=True, exist_ok=True)
        return last

    def prepare(self, shared_tokens: int) -> None:
        """Features of all jobs, scores without a prompt, first values and forms of the prompts."""
        from transformers import set_seed

        if self.settings.placement == "after_bos":
            for job in self.jobs:
                job.task.special_tokens = False
        encoder_decoder = is_encoder_decoder(self.model.base_model)
        encoded = [encode(j.task, j.train_rows, self.tokenizer, encoder_decoder=encoder_decoder) for j in self.jobs]
        most = max(map(len, encoded))
        self.features: Rows = []
        for group, (job, features) in enumerate(zip(self.jobs, encoded, strict=True)):
            own = [feature | {"prompt": job.task.prompt, "group": group} for feature in features]
            self.features += (own * -(-most // len(own)))[:most]
        self.losses = [
            choose_loss(
                self.settings.objective,
                job.task,
                self.tokenizer,
                label_smoothing=self.settings.label_smoothing,
                encoder_decoder=encoder_decoder,
            )
            for job in self.jobs
        ]
        for job in self.jobs:
            self.before.append(
                evaluate_bare(self.model, self.tokenizer, job.task, job.held_out_rows, self.settings.batch_size)
                if job.scorer is None
                else job.scorer(None)
            )
            self.console.print(f"{self._of(job)}without a prompt: {describe(self.before[-1])}", highlight=False)
        set_seed(self.settings.seed)
        shared = None
        if shared_tokens:
            source = replace(self.jobs[0].task, prompt="shared")
            add_prompt(self.model, self.tokenizer, source, replace(self.settings, num_virtual_tokens=shared_tokens))
            shared = nn.Parameter(self.model.prompts.values("shared"))
            self.model.remove_prompt("shared")
        for job in self.jobs:
            if job.task.prompt not in self.model.prompts:
                add_prompt(self.model, self.tokenizer, job.task, job.settings or self.settings)
                if self.settings.token_update_rank is not None:
                    self._add_token_update(job)
            set_form(self.model, self.tokenizer, job.task.prompt, self.settings, shared)

    def _add_token_update(self, job: TuningJob) -> None:
        """Of the places that training texts have."""
        if isinstance(self.model, DeepPromptModel):
            raise ValueError(
                f"`token_update_rank` must be None for deep prompts, got {self.settings.token_update_rank}"
            )
        longest = max(len(f["input_ids"]) for f in self.features if f["prompt"] == job.task.prompt)
        rank = min(self.settings.token_update_rank or 1, longest)
        self.model.prompts.add_token_update(job.task.prompt, longest, rank, seed=self.settings.seed)

    def tune(self, last: str | None, report_to: Sequence[str], callbacks: Sequence[Any]) -> list[TuningResult]:
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from .trainer import GracefulStop, PromptTrainer, RichProgress

        others = [name for name in self.model.prompts if name not in {job.task.prompt for job in self.jobs}]
        trained = {name: self.model.prompts[name].requires_grad for name in others}
        for name in others:
            self.model.prompts.freeze_prompt(name)
        self.best = BestPrompts(self.model, self.checkpoints / "best", self.settings.best_by)
        self.history: list[list[dict[str, float]]] = [[] for _ in self.jobs]
        trainer = self.trainer = PromptTrainer(
            self.model,
            self._arguments(report_to),
            data_collator=Collator(pad_token_id(self.tokenizer)),
            train_dataset=self.features,
            eval_dataset=self.features[:1],  # scored by the evaluator instead
            evaluator=self._evaluate,
            losses=self.losses,
            update_learning_rate=self.settings.token_update_learning_rate,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        stop = GracefulStop(self.console)
        trainer.add_callback(stop)
        trainer.add_callback(RichProgress(self.console, lambda: trainer.tokens_seen))
        if self.settings.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.settings.patience))
        for callback in callbacks:
            trainer.add_callback(callback)
        self.start = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=last)
        finally:
            stop.restore()
        seconds = time.perf_counter() - self.start
        steps = trainer.state.global_step
        if not self.history[0] or self.history[0][-1]["step"] != steps:
            self._evaluate()
        for name, gradient in trained.items():
            self.model.prompts.freeze_prompt(name, not gradient)
        return self._finish(seconds, steps, stop.requested)

    def _arguments(self, report_to: Sequence[str]) -> Any:
        from transformers import TrainingArguments

        settings, prompts = self.settings, len(self.jobs)
        rows = settings.batch_size * prompts
        per_epoch = -(-len(self.features) // (rows * settings.gradient_accumulation_steps))
        total = settings.steps or (round(per_epoch * settings.epochs) if settings.epochs else DEFAULT_STEPS) or 1
        every = settings.eval_every or max(1, total // 5)
        on_cpu = self.model.device.type == "cpu"
        return TrainingArguments(
            output_dir=str(self.checkpoints),
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
            metric_for_best_model=self.metric,
            greater_is_better=self.metric == "accuracy",
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_steps=max(1, min(10, total // 10)),
            report_to=list(report_to) or "none",
            seed=settings.seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            ddp_find_unused_parameters=prompts > 1,
        )

    def _evaluate(self) -> dict[str, float]:
        """Scores every prompt, keeps what is best; their means under plain names, for Trainer and the progress bar."""
        step = self.trainer.state.global_step
        seconds = time.perf_counter() - self.start - self.trainer.evaluation_seconds
        every = []
        for job, history in zip(self.jobs, self.history, strict=True):
            name = job.task.prompt
            scores = (
                evaluate(
                    self.model,
                    self.tokenizer,
                    job.task,
                    job.held_out_rows,
                    batch_size=self.settings.batch_size,
                    prompt=name,
                )
                if job.scorer is None
                else job.scorer(name)
            )
            every.append(scores)
            history.append({"step": step, "seconds": seconds} | scores)
            self.best.update(name, scores, step)
        if len(every) == 1:
            return every[0]
        found = {key: sum(s[key] for s in every) / len(every) for key in every[0] if all(key in s for s in every)}
        for job, scores in zip(self.jobs, every, strict=True):
            found |= {f"{job.task.prompt}_{key}": scores[key] for key in ("accuracy", "loss") if key in scores}
        return found

    def _finish(self, seconds: float, steps: int, interrupted: bool) -> list[TuningResult]:
        results = []
        for job, before, history in zip(self.jobs, self.before, self.history, strict=True):
            name = job.task.prompt
            fold(self.model.prompts, name)
            after = self.best.restore(name)
            self.model.save_pretrained(self.output, [name])
            job.task.save(self.output / name)
            results.append(
                TuningResult(
                    self.output / name,
                    before,
                    after,
                    seconds,
                    self.trainer.evaluation_seconds,
                    steps,
                    self.best.found[name]["step"],
                    interrupted,
                    history,
                )
            )
            shown = f"{self._of(job)}with the prompt: {describe(after)}; saved in {results[-1].folder}"
            self.console.print(shown, highlight=False)
        self._write_metrics(results)
        return results

    def _write_metrics(self, results: list[TuningResult]) -> None:
        facts: dict[str, Any] = {
            "tuning_seconds": results[0].tuning_seconds,
            "evaluation_seconds": results[0].evaluation_seconds,
            "steps": results[0].steps,
            "seed": self.settings.seed,
            "settings": self.settings.to_json(),
        }
        scores = [
            {"before": r.before, "after": r.after, "best_step": r.best_step, "history": r.history} for r in results
        ]
        if len(results) == 1:
            facts = scores[0] | facts
        else:
            facts["prompts"] = {job.task.prompt: s for job, s in zip(self.jobs, scores, strict=True)}
        (self.output / METRICS).write_text(json.dumps(facts, indent=2) + "\n")

    def _of(self, job: TuningJob) -> str:
        return f"{job.task.prompt}: " if len(self.jobs) > 1 else ""


def evaluate_bare(model: SoftPromptModel, tokenizer: Any, task: Task, rows: Rows, batch_size: int) -> dict[str, float]:
    """Scores of the model without any prompt in front."""
    return evaluate(
        SoftPromptModel(model.base_model), tokenizer, replace(task, special_tokens=True), rows, batch_size=batch_size
    )


def describe(scores: dict[str, float]) -> str:
    """Scores in words."""
    if "accuracy" in scores:
        low, high = scores["accuracy_low"], scores["accuracy_high"]
        return f"accuracy {scores['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {scores['rows']:.0f} rows)"
    return f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f} ({scores['rows']:.0f} rows)"
