"""One job in its own process: ``python -m softprompt_fast.comparison.worker job.json``.

Time and peak memory are measured for this job alone, and an error here does not end the other jobs.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ..base.files import write_json
from ..base.machine import environment
from .settings import RESULT_FORMAT, Job


def main(path: str) -> int:
    """Writes the job's result, even if it is a failure; returns the exit status."""
    _die_with_parent()
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    result: dict[str, Any] = {
        "format": RESULT_FORMAT,
        "key": job.key(),
        "method": job.method,
        "seed": job.seed,
        "options": job.options,
        "batch_size": job.batch_size,
        "threads": job.threads,
    }
    status = 0
    try:
        result |= run(job)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        result |= {"status": "error", "reason": f"{type(error).__name__}: {text}", "traceback": traceback.format_exc()}
        status = 1
    write_json(Path(job.result), result)
    return status


def run(job: Job) -> dict[str, Any]:
    """Loads the model, runs the method, scores the test rows once."""
    import shutil

    import torch

    from ..hf.architecture import is_causal, is_encoder_decoder
    from ..hf.loading import load_base_model
    from ..ops.extension import backend
    from ..tasks.task import Task
    from .cost import cost
    from .encoding import Encoder
    from .memory import PeakMemory
    from .methods import RUNNERS
    from .splits import SPLITS, read_split
    from .work import NotApplicable, Work

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    start = time.perf_counter()
    task = Task(**job.task)
    splits = {name: read_split(job.data, name) for name in SPLITS}
    model, tokenizer = load_base_model(job.model, job.dtype, job.device)
    if is_encoder_decoder(model) or not is_causal(model):
        raise ValueError(f"`model` must be a decoder, got {type(model).__name__}")
    facts: dict[str, Any] = {
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": environment(model.device, backend.state().name),
        "load_seconds": time.perf_counter() - start,
    }
    shutil.rmtree(job.artifacts, ignore_errors=True)
    texts = [len(text) for text in Encoder(task, tokenizer).texts(splits["test"])]
    memory = PeakMemory(model.device)
    facts["memory_loaded"] = memory.reset()
    processor = time.process_time()
    try:
        ready = RUNNERS[job.method](Work(job, task, model, tokenizer, splits))
    except NotApplicable as reason:
        return facts | {"status": "not applicable", "reason": str(reason)}
    facts["memory_training"] = memory.peak()
    facts["processor_seconds"] = time.process_time() - processor  # less affected by other load on the machine
    memory.reset()
    ready.score(splits["validation"][: job.batch_size])  # warm-up: the first batch is not timed
    start, processor = time.perf_counter(), time.process_time()
    scores = ready.score(splits["test"])
    facts["inference_seconds"] = time.perf_counter() - start
    facts["inference_processor_seconds"] = time.process_time() - processor
    facts["memory_inference"] = memory.peak()
    facts["memory_resettable"] = memory.resettable
    if not bool(scores.losses.isfinite().all()):
        raise FloatingPointError("scores of some test rows are not finite numbers")
    costs = cost(model, texts, ready.prefix_tokens, uses_head=ready.uses_head)
    predicted = None if scores.predicted is None else [task.labels[i] for i in scores.predicted.tolist()]
    return facts | {
        "status": "ok",
        "rows": {
            "predicted": predicted,
            "correct": None if scores.correct is None else scores.correct.int().tolist(),
            "losses": scores.losses.tolist(),
            "weights": scores.weights.tolist(),
        },
        "summary": scores.summary(),
        "trainable_parameters": ready.trainable_parameters,
        "stored_bytes": ready.stored_bytes,
        "train_seconds": ready.train_seconds,
        "evaluation_seconds": ready.evaluation_seconds,
        "text_tokens": costs.text_tokens,
        "prefix_tokens": costs.prefix_tokens,
        "flops_per_row": costs.flops,
        "flops_per_row_cached": costs.flops_cached,
        "detail": ready.detail,
    }


def _die_with_parent() -> None:
    """On Linux: killing the comparison also ends this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
