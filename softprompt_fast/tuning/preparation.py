"""A tuning run before its first step: checks, the run to resume, encoded rows, prompts, scores without a prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..evaluation.predictions import evaluate_bare
from ..evaluation.scores import describe_scores
from ..hf.architecture import context_length, is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import check_name
from ..prompts.placement import bos_vector
from ..tasks.cuts import counting_cuts
from ..tasks.encoding import check_label_words, encode
from ..tasks.examples import Examples, check_complete
from ..tasks.head import ANSWERS
from ..tasks.head_encoding import encode_for_head
from ..tasks.words import alike
from .job import TuningJob
from .objective import AnswerLoss, HeadLoss, choose_loss
from .prompt_setup import add_prompt, set_form
from .record import RunRecord, run_facts
from .settings import TuningSettings

logger = logging.getLogger("softprompt_fast")


@dataclass(frozen=True)
class Prepared:
    """A run that can start: its rows are encoded and its prompts are in the model."""

    model: SoftPromptModel
    tokenizer: Any
    jobs: list[TuningJob]
    output: Path
    settings: TuningSettings
    console: Console
    record: RunRecord
    facts: dict[str, Any]
    """See :func:`run_facts`."""
    checkpoint: str | None
    """The checkpoint to resume from; None: the run starts at its first step."""
    features: Examples
    """The training rows of all jobs, job by job; ``prompt`` and ``group`` say which job a row belongs to."""
    losses: list[AnswerLoss | HeadLoss]
    """The loss of each job."""
    before: list[dict[str, float]]
    """Held-out scores of each job without a prompt."""

    @property
    def names(self) -> list[str]:
        return [job.task.prompt for job in self.jobs]


def lengths_of(features: Examples, name: str) -> list[int]:
    """Tokens of each training row of a prompt."""
    return [len(feature["input_ids"]) for feature in features if feature["prompt"] == name]


def line_prefix(job: TuningJob, jobs: Sequence[TuningJob]) -> str:
    """The prompt's name in front of a printed line, if there are several."""
    return f"{job.task.prompt}: " if len(jobs) > 1 else ""


def check_jobs(jobs: Sequence[TuningJob], settings: TuningSettings, shared_tokens: int) -> None:
    """Checks that need no model.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    names = [job.task.prompt for job in jobs]
    if not jobs or len(set(names)) != len(names):
        raise ValueError(f"`jobs` must be one or more with prompts of different names, got {names}")
    for job in jobs:
        check_name(job.task.prompt)
        for argument, rows in (("train_rows", job.train_rows), ("held_out_rows", job.held_out_rows)):
            if not rows:
                raise ValueError(f"`{argument}` must hold at least one row, got none for {job.task.prompt!r}")
            check_complete(job.task, rows, argument)
    if settings.placement == "after_bos" and shared_tokens:
        raise ValueError("`shared_tokens` cannot be combined with placement='after_bos'")
    if settings.num_frozen_tokens and shared_tokens:
        raise ValueError("`shared_tokens` cannot be combined with `num_frozen_tokens`")
    heads = [job.task.head.name for job in jobs if job.task.head is not None]
    if heads and len(jobs) > 1:
        raise ValueError("a task with a head cannot be combined with other tasks in one run")
    if heads and settings.placement == "after_bos":
        raise ValueError("placement='after_bos' cannot be combined with a head")
    if heads and settings.objective != "labels":
        raise ValueError(f"`objective` {settings.objective} cannot be combined with a head")
    if ANSWERS in heads and settings.label_smoothing:
        raise ValueError(f"`label_smoothing` cannot be combined with the head {ANSWERS}")


def prepare(
    model: SoftPromptModel,
    tokenizer: Any,
    jobs: list[TuningJob],
    output: Path,
    settings: TuningSettings,
    *,
    shared_tokens: int,
    resume: bool,
    console: Console,
) -> Prepared:
    """Encodes the rows, adds the prompts to the model in the form they are trained in, and scores it without them.

    After an error the model has the prompts that it had before.
    """
    from transformers import set_seed

    if model.train_adapters:
        raise ValueError("`model` must have train_adapters=False because tuning trains and stores prompts only")
    record = RunRecord(output)
    if not resume:
        _check_new(output, record, jobs)
    facts = run_facts(model, jobs, settings, shared_tokens)
    checkpoint = record.resume(facts) if resume else None
    encoder_decoder = is_encoder_decoder(model.base_model)
    features, longest = _encode_rows(jobs, tokenizer, encoder_decoder)
    losses: list[AnswerLoss | HeadLoss] = [
        HeadLoss(settings.label_smoothing)
        if job.task.head is not None
        else choose_loss(
            settings.objective,
            job.task,
            tokenizer,
            label_smoothing=settings.label_smoothing,
            encoder_decoder=encoder_decoder,
        )
        for job in jobs
    ]
    set_seed(settings.seed)
    with _removing_new_prompts_after_an_error(model):
        _add_prompts(model, tokenizer, jobs, settings, shared_tokens, features)
        _check_context(model, jobs, longest)
    before = []
    for job in jobs:
        console.print(
            f"{line_prefix(job, jobs)}scoring {len(job.held_out_rows)} held-out rows without a prompt", highlight=False
        )
        with counting_cuts(log=False):  # counted once, when the rows were encoded
            before.append(
                evaluate_bare(model, tokenizer, job.task, job.held_out_rows, settings.batch_size)
                if job.scorer is None
                else job.scorer(None)
            )
        console.print(f"{line_prefix(job, jobs)}without a prompt: {describe_scores(before[-1])}", highlight=False)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        jobs=jobs,
        output=output,
        settings=settings,
        console=console,
        record=record,
        facts=facts,
        checkpoint=checkpoint,
        features=features,
        losses=losses,
        before=before,
    )


def _check_new(output: Path, record: RunRecord, jobs: list[TuningJob]) -> None:
    for path in (record.facts_file, *(output / job.task.prompt for job in jobs)):
        if path.exists():
            raise FileExistsError(f"{path} already exists; resume the run, or choose another output folder")


def _encode_rows(jobs: list[TuningJob], tokenizer: Any, encoder_decoder: bool) -> tuple[Examples, list[int]]:
    """The training rows of all jobs as features, and the tokens of the longest row of each job, held-out rows too."""
    features: Examples = []
    longest: list[int] = []
    for group, job in enumerate(jobs):
        if job.task.head is None:
            check_label_words(job.task, job.train_rows, tokenizer, encoder_decoder=encoder_decoder)
        _warn_of_labels(job)
        with counting_cuts():
            train, held_out = (
                encode(job.task, rows, tokenizer, encoder_decoder=encoder_decoder)
                if job.task.head is None
                else encode_for_head(job.task, rows, tokenizer)
                for rows in (job.train_rows, job.held_out_rows)
            )
        if not train:
            raise ValueError("no answer lies in one part of its context; give a larger `stride`")
        longest.append(max(len(feature["input_ids"]) for feature in train + held_out))
        features += [feature | {"prompt": job.task.prompt, "group": group} for feature in train]
    return features, longest


def _warn_of_labels(job: TuningJob) -> None:
    """Logs labels that are probably one, and labels that cannot be learnt."""
    for group in alike(job.task.labels):
        logger.warning(
            "labels %s differ only in case, white space or Unicode form; each is a class of its own",
            ", ".join(map(repr, group)),
        )
    column = job.task.target_column
    if job.task.kind == "tagging":
        trained, held_out = (
            {tag for row in rows for tag in job.task.tags(row)} for rows in (job.train_rows, job.held_out_rows)
        )
    else:
        trained, held_out = ({str(row.get(column)) for row in rows} for rows in (job.train_rows, job.held_out_rows))
    missing = [label for label in job.task.labels if label in held_out - trained]
    if missing:
        logger.warning("no training row has the labels %s of held-out rows", ", ".join(map(repr, missing)))


@contextmanager
def _removing_new_prompts_after_an_error(model: SoftPromptModel) -> Iterator[None]:
    known = set(model.prompts)
    try:
        yield
    except Exception:
        for name in set(model.prompts) - known:
            model.remove_prompt(name)
        raise


def _add_prompts(
    model: SoftPromptModel,
    tokenizer: Any,
    jobs: list[TuningJob],
    settings: TuningSettings,
    shared_tokens: int,
    features: Examples,
) -> None:
    """Adds the prompts that the model does not have yet, and sets the form of all."""
    shared = None
    if shared_tokens:
        scratch = type(model)(model.base_model)
        add_prompt(scratch, tokenizer, jobs[0].task, replace(settings, num_virtual_tokens=shared_tokens))
        shared = nn.Parameter(scratch.prompts.snapshot(jobs[0].task.prompt))
    for job in jobs:
        name = job.task.prompt
        if name in model.prompts:
            if shared is not None:
                raise ValueError(
                    f"`shared_tokens` cannot be combined with a prompt that the model already has: {name!r}"
                )
            _check_starts_with_bos(model, tokenizer, name, settings)
            logger.info("the model already has prompt %r, which is tuned further; `init` is not used", name)
        else:
            add_prompt(model, tokenizer, job.task, job.settings or settings)
            if settings.token_update_rank is not None:  # one vector for each place of a training text
                longest = max(lengths_of(features, name))
                rank = min(settings.token_update_rank, longest)
                model.prompts.add_token_update(name, longest, rank, seed=settings.seed)
        set_form(model, tokenizer, name, settings, shared)


def _check_starts_with_bos(model: SoftPromptModel, tokenizer: Any, name: str, settings: TuningSettings) -> None:
    """Training after BOS fixes a prompt's first vector to BOS's: any other first vector would be lost."""
    if settings.placement == "after_bos":
        bos = bos_vector(model, tokenizer)
        if not torch.equal(model.prompts.snapshot(name)[0], bos.to(model.prompts[name])):
            raise ValueError(
                f"`placement` must be 'before_bos' for {name!r}, which does not begin with BOS; got 'after_bos'"
            )


def _check_context(model: SoftPromptModel, jobs: list[TuningJob], longest: list[int]) -> None:
    """Checks that prompt and text fit the model's context."""
    context = context_length(model.base_model)
    if context is None:
        return
    for job, text in zip(jobs, longest, strict=True):
        tokens = len(model.prompts.snapshot(job.task.prompt))
        if tokens + text > context:
            raise ValueError(
                f"`max_length` must leave room for {tokens} virtual tokens in the model's context of {context}, "
                f"got texts of {text} tokens for {job.task.prompt!r}"
            )
