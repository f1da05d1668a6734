"""The main job, start to end: a frozen model, rows, a task -> a tuned prompt on disk with its scores.

Several jobs run in one loop: each step is a mixed batch of rows of all of them, each behind its own prompt.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..evaluation.predictions import evaluate, evaluate_bare
from ..evaluation.scores import describe_scores
from ..hf.architecture import context_length, is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import check_name
from ..prompts.placement import bos_vector
from ..prompts.reparameterization import fold
from ..tasks.collation import Collator, pad_token_id
from ..tasks.encoding import encode
from ..tasks.examples import Examples, is_empty
from ..tasks.task import Task
from .best import BestPrompts
from .job import TuningJob, TuningResult
from .objective import choose_loss
from .prepare import add_prompt, check_form, set_form
from .record import RunRecord, run_facts, step_of
from .sampler import TaskSampler
from .settings import DEFAULT_STEPS, TuningSettings

logger = logging.getLogger("softprompt_fast")

METRICS = "metrics.json"


def tune(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
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

    A step takes ``batch_size`` rows of each job; jobs with fewer rows see theirs more often.

    Args:
        shared_tokens: vectors that all prompts have in common at their start and train together; each saved prompt
            holds them in front of its own.

    Other arguments, files and errors as of :func:`tune`.
    """
    settings = (settings or TuningSettings()).with_changes(changes)
    _check(jobs, settings, shared_tokens)
    check_form(model, tokenizer, settings)
    if settings.placement == "after_bos":  # texts come without BOS, which the prompt holds
        jobs = [replace(job, task=replace(job.task, special_tokens=False)) for job in jobs]
    run = _Run(model, tokenizer, list(jobs), Path(output), settings, shared_tokens, console or Console(stderr=True))
    with _restored(model, [job.task.prompt for job in jobs]):
        run.open(resume)
        run.prepare()
        return run.tune(report_to, callbacks)


def _check(jobs: Sequence[TuningJob], settings: TuningSettings, shared_tokens: int) -> None:
    """What can be refused before anything runs."""
    names = [job.task.prompt for job in jobs]
    if not jobs or len(set(names)) != len(names):
        raise ValueError(f"`jobs` must be one or more with prompts of different names, got {names}")
    for job in jobs:
        check_name(job.task.prompt)
        for argument, rows in (("train_rows", job.train_rows), ("held_out_rows", job.held_out_rows)):
            if not rows:
                raise ValueError(f"`{argument}` must hold at least one row, got none for {job.task.prompt!r}")
            for i, row in enumerate(rows):
                if is_empty(job.task, row) or row.get(job.task.target_column, "") is None:
                    raise ValueError(
                        f"`{argument}` must hold text and {job.task.target_column!r} in each row, row {i} of "
                        f"{job.task.prompt!r} lacks one"
                    )
    if settings.placement == "after_bos" and shared_tokens:
        raise ValueError(f"`shared_tokens` must be 0 with placement='after_bos', got {shared_tokens}")


@contextmanager
def _restored(model: SoftPromptModel, names: list[str]) -> Iterator[None]:
    """Freezes the other prompts. Afterwards, whatever happened, they are free, modes as before, and prompts plain."""
    modes = [(module, module.training) for module in model.modules()]
    others = {name: model.prompts[name].requires_grad for name in model.prompts if name not in names}
    for name in others:
        model.prompts.freeze_prompt(name)
    try:
        yield
    finally:
        for name in names:
            if name in model.prompts:
                fold(model.prompts, name)
        for name, trained in others.items():
            model.prompts.freeze_prompt(name, not trained)
        for module, training in modes:
            module.training = training


class _Run:
    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any,
        jobs: list[TuningJob],
        output: Path,
        settings: TuningSettings,
        shared_tokens: int,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.jobs, self.output = model, tokenizer, jobs, output
        self.settings, self.shared_tokens, self.console = settings, shared_tokens, console
        self.record = RunRecord(output / "checkpoints")
        of_labels = all(job.task.kind == "classification" for job in jobs)
        self.metric = settings.best_by if of_labels else "loss"
        self.last: str | None = None
        self.before: list[dict[str, float]] = []

    def open(self, resume: bool) -> None:
        """A new folder, or the last state of the run that is resumed."""
        found = any((self.output / job.task.prompt).exists() for job in self.jobs)
        if not resume and (found or self.record.exists()):
            raise FileExistsError(f"{self.output} already holds a run; resume it, or choose another output folder")
        self.facts = run_facts(self.model, self.jobs, self.settings, self.shared_tokens)
        if resume:
            self.last = self.record.resume(self.facts)

    def prepare(self) -> None:
        """Features of all jobs, first values and forms of the prompts, scores without a prompt."""
        from transformers import set_seed

        encoder_decoder = is_encoder_decoder(self.model.base_model)
        self.features: Examples = []
        self.longest: list[int] = []
        for group, job in enumerate(self.jobs):
            found, apart = (
                encode(job.task, rows, self.tokenizer, encoder_decoder=encoder_decoder)
                for rows in (job.train_rows, job.held_out_rows)
            )
            self.longest.append(max(len(f["input_ids"]) for f in found + apart))
            self.features += [feature | {"prompt": job.task.prompt, "group": group} for feature in found]
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
        set_seed(self.settings.seed)
        known = self.model.prompts.names
        try:
            self._add_prompts()
            self._check_room()
        except Exception:
            for name in set(self.model.prompts) - set(known):
                self.model.remove_prompt(name)
            raise
        for job in self.jobs:
            self.before.append(
                evaluate_bare(self.model, self.tokenizer, job.task, job.held_out_rows, self.settings.batch_size)
                if job.scorer is None
                else job.scorer(None)
            )
            self.console.print(f"{self._of(job)}without a prompt: {describe_scores(self.before[-1])}", highlight=False)

    def _add_prompts(self) -> None:
        shared = None
        if self.shared_tokens:
            settings = replace(self.settings, num_virtual_tokens=self.shared_tokens)
            apart = type(self.model)(self.model.base_model)
            add_prompt(apart, self.tokenizer, self.jobs[0].task, settings)
            shared = nn.Parameter(apart.prompts.snapshot(self.jobs[0].task.prompt))
        for job in self.jobs:
            if job.task.prompt in self.model.prompts:
                if shared is not None:
                    raise ValueError(
                        f"`shared_tokens` must be 0 for a prompt that the model has already, got {self.shared_tokens} "
                        f"for {job.task.prompt!r}"
                    )
                self._check_place(job.task.prompt)
                logger.info("prompt %r is there already and tuned further; `init` is not used", job.task.prompt)
            else:
                add_prompt(self.model, self.tokenizer, job.task, job.settings or self.settings)
                if self.settings.token_update_rank is not None:
                    self._add_token_update(job)
            set_form(self.model, self.tokenizer, job.task.prompt, self.settings, shared)

    def _check_place(self, name: str) -> None:
        """That a prompt which is tuned further behind BOS begins with it: its first vector would be lost."""
        if self.settings.placement == "after_bos":
            bos = bos_vector(self.model, self.tokenizer)
            if not torch.equal(self.model.prompts.snapshot(name)[0], bos.to(self.model.prompts[name])):
                raise ValueError(
                    f"`placement` must be 'before_bos' for {name!r}, which does not begin with BOS; got 'after_bos'"
                )

    def _check_room(self) -> None:
        """That prompt and text fit the context."""
        context = context_length(self.model.config)
        if context is None or is_encoder_decoder(self.model.base_model):
            return
        for job, longest in zip(self.jobs, self.longest, strict=True):
            tokens = len(self.model.prompts.snapshot(job.task.prompt))
            if tokens + longest > context:
                raise ValueError(
                    f"`max_length` must leave room for {tokens} virtual tokens in the model's context of {context}, "
                    f"got texts of {longest} tokens for {job.task.prompt!r}"
                )

    def _add_token_update(self, job: TuningJob) -> None:
        """Of the places that training texts have."""
        longest = max(len(f["input_ids"]) for f in self.features if f["prompt"] == job.task.prompt)
        rank = min(self.settings.token_update_rank or 1, longest)
        self.model.prompts.add_token_update(job.task.prompt, longest, rank, seed=self.settings.seed)

    def tune(self, report_to: Sequence[str], callbacks: Sequence[Any]) -> list[TuningResult]:
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from .trainer import GracefulStop, PromptTrainer, RichProgress

        settings, names = self.settings, [job.task.prompt for job in self.jobs]
        self.best = BestPrompts(self.model, self.record.folder / "best", settings.best_by)
        self.history = self.record.history(names, self.last)
        lengths = [[len(f["input_ids"]) for f in self.features if f["prompt"] == name] for name in names]
        padded = self.model.execution_report().execution == "padded"
        sampler = TaskSampler(lengths, settings.batch_size, settings.seed, by_length=padded)
        arguments = self._arguments(report_to, len(sampler))
        arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer's DataParallel cannot split lists; torchrun is for several
        if self.model.device.type == "cuda" and self.model.device != arguments.device:
            raise ValueError(
                f"`model` must be on {arguments.device}, where Trainer runs, got {self.model.device}; "
                "CUDA_VISIBLE_DEVICES chooses another GPU"
            )
        trainer = self.trainer = PromptTrainer(
            self.model,
            arguments,
            data_collator=Collator(pad_token_id(self.tokenizer)),
            train_dataset=self.features,
            eval_dataset=self.features[:1],  # scored by the evaluator instead
            evaluator=self._evaluate,
            losses=self.losses,
            update_learning_rate=settings.token_update_learning_rate,
            sampler=sampler,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        stop = GracefulStop(self.console)
        trainer.add_callback(stop)
        trainer.add_callback(RichProgress(self.console, lambda: trainer.tokens_seen))
        if settings.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(settings.patience))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.accelerator.wait_for_everyone()  # all processes have seen whether there is a run
        if self.last is None and trainer.is_world_process_zero():
            self.record.start(self.facts)
        steps = step_of(self.last)
        self.start = time.perf_counter()
        if steps >= trainer.args.max_steps:
            self.console.print(f"finished already, at step {steps}")
        else:
            try:
                trainer.train(resume_from_checkpoint=self.last)
            finally:
                stop.restore()
            steps = trainer.state.global_step
            if not self.history[0] or self.history[0][-1]["step"] != steps:
                self._evaluate()
        return self._finish(time.perf_counter() - self.start, steps, stop.requested)

    def _arguments(self, report_to: Sequence[str], rows_per_epoch: int) -> Any:
        from transformers import TrainingArguments

        settings, prompts = self.settings, len(self.jobs)
        rows = settings.batch_size * prompts
        per_epoch = -(-rows_per_epoch // (rows * settings.gradient_accumulation_steps))
        total = settings.steps or (round(per_epoch * settings.epochs) if settings.epochs else DEFAULT_STEPS) or 1
        every = settings.eval_every or max(1, total // 5)
        on_cpu = self.model.device.type == "cpu"
        return TrainingArguments(
            output_dir=str(self.record.folder),
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
        seconds = self.record.seconds_before + time.perf_counter() - self.start - self.trainer.evaluation_seconds
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
            if not math.isfinite(scores["loss"]):
                raise FloatingPointError(
                    f"the held-out loss of {name!r} is {scores['loss']} at step {step}; try a smaller `learning_rate`"
                )
            every.append(scores)
            history.append({"step": step, "seconds": seconds} | scores)
            self.best.update(name, scores, step)
        self.record.write_history([job.task.prompt for job in self.jobs], self.history)
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
            trained = self._trainable_parameters(name)
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
                    trained,
                    history,
                )
            )
            shown = f"{self._of(job)}with the prompt: {describe_scores(after)}; saved in {results[-1].folder}"
            self.console.print(shown, highlight=False)
        self._write_metrics(results)
        return results

    def _trainable_parameters(self, name: str) -> int:
        bank = self.model.prompts
        forms = bank.forms(name)
        values = [bank[name]] if forms is None else list(forms.parameters())
        values += bank.token_update(name) or ()
        count = sum(value.numel() for value in values if value.requires_grad)
        if self.settings.placement == "after_bos":  # the first row, BOS's, is not trained
            low_rank = self.settings.reparameterization == "low-rank"
            count -= self.settings.rank if low_rank else bank[name].shape[1]
        return count

    def _write_metrics(self, results: list[TuningResult]) -> None:
        if not self.trainer.is_world_process_zero():
            return
        facts: dict[str, Any] = {
            "tuning_seconds": results[0].tuning_seconds,
            "evaluation_seconds": results[0].evaluation_seconds,
            "steps": results[0].steps,
            "seed": self.settings.seed,
            "settings": self.settings.to_json(),
        }
        names = ("before", "after", "best_step", "trainable_parameters", "history")
        scores = [{name: getattr(result, name) for name in names} for result in results]
        if len(results) == 1:
            facts = scores[0] | facts
        else:
            facts["prompts"] = {job.task.prompt: s for job, s in zip(self.jobs, scores, strict=True)}
        (self.output / METRICS).write_text(json.dumps(facts, indent=2) + "\n")

    def _of(self, job: TuningJob) -> str:
        return f"{job.task.prompt}: " if len(self.jobs) > 1 else ""
