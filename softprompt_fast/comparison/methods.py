"""The methods: each turns a frozen model and rows into something that scores rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from ..base.files import size_of
from ..hf.architecture import context_length
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.task import TASK_FILE, Task
from ..tuning.settings import TuningSettings
from .backends import Packed
from .baselines import full, lora, peft_prompt
from .encoding import Encoder, common_start, fitting_shots
from .probe import fit_probe
from .scores import score_rows
from .work import NotApplicable, Ready, Work


def zero_shot(work: Work) -> Ready:
    return _in_context(work, "")


def instruction(work: Work) -> Ready:
    return _in_context(work, work.options["instruction"])


def few_shot(work: Work) -> Ready:
    plain = Encoder(work.task, work.tokenizer)
    rows = [row for split in work.splits.values() for row in split]
    context = context_length(work.model)
    room = None
    if context is not None:
        room = context - max(map(len, plain.texts(rows))) - max(map(len, plain.targets(rows)))
    text, shots = fitting_shots(
        work.task,
        work.tokenizer,
        work.options["instruction"],
        work.splits["train"],
        int(work.options["shots"]),
        work.job.seed,
        str(work.options["separator"]),
        room,
    )
    return _in_context(work, text, {"shots": len(shots), "text in front": text})


def _in_context(work: Work, prefix: str, detail: dict[str, Any] | None = None) -> Ready:
    encoder = Encoder(work.task, work.tokenizer, prefix)
    sample = work.splits["validation"][:50]
    plain, texts = Encoder(work.task, work.tokenizer), [encoder.text(row) for row in sample]
    added = [len(text) - len(plain.text(row)) for text, row in zip(texts, sample, strict=True)]
    front = common_start(texts)[: min(added)] if prefix else []
    backend = Packed(SoftPromptModel(work.model), front=front)
    return Ready(
        lambda rows: score_rows(backend, encoder, rows, work.job.batch_size),
        prefix_tokens=sum(added) / len(added),
        stored_bytes=len(prefix.encode()),
        detail=detail or {},
    )


def prompt(work: Work) -> Ready:
    from ..tuning.run import tune

    settings = TuningSettings(batch_size=work.job.batch_size, seed=work.job.seed).with_changes(work.options)
    tuned = SoftPromptModel(work.model)
    result = tune(
        tuned,
        work.tokenizer,
        work.task,
        work.splits["train"],
        work.splits["validation"],
        work.artifacts,
        settings,
        console=Console(stderr=True),
    )
    shutil.rmtree(work.artifacts / "checkpoints", ignore_errors=True)
    tuned.eval()
    backend = Packed(tuned, work.task.prompt)
    encoder = Encoder(Task.load(result.folder), work.tokenizer)  # its task.json says whether texts are read without BOS
    values = tuned.prompts[work.task.prompt]
    return Ready(
        lambda rows: score_rows(backend, encoder, rows, work.job.batch_size),
        prefix_tokens=len(values),
        trainable_parameters=result.trainable_parameters,
        stored_bytes=size_of(result.folder)
        - (result.folder / TASK_FILE).stat().st_size,  # the other methods store no task
        train_seconds=result.tuning_seconds - result.evaluation_seconds,
        evaluation_seconds=result.evaluation_seconds,
        detail={
            "settings": settings.to_json(),
            "execution": str(tuned.execution_report()),
            "best step": result.best_step,
            "validation": result.history,
        },
    )


def linear_probe(work: Work) -> Ready:
    if work.task.kind != "classification":
        raise NotApplicable("a linear probe gives labels, not text")
    start = time.perf_counter()
    fitted = fit_probe(work.model, work.tokenizer, work.task, work.splits, work.options, work.job.batch_size)
    seconds = time.perf_counter() - start
    work.artifacts.mkdir(parents=True, exist_ok=True)
    fitted.save(work.artifacts)
    return Ready(
        fitted.score,
        trainable_parameters=fitted.parameters,
        stored_bytes=size_of(work.artifacts),
        train_seconds=seconds - fitted.evaluation_seconds,
        evaluation_seconds=fitted.evaluation_seconds,
        uses_head=False,
        detail={"C": fitted.C, "validation": fitted.searched},
    )


RUNNERS: dict[str, Callable[[Work], Ready]] = {
    "zero-shot": zero_shot,
    "instruction": instruction,
    "few-shot": few_shot,
    "prompt": prompt,
    "peft-prompt": peft_prompt,
    "lora": lora,
    "linear-probe": linear_probe,
    "full": full,
}
