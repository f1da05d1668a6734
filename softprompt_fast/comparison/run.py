"""The comparison, start to end: splits and jobs -> results -> tables and a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from ..base.fields import SEED
from ..base.files import write_atomically, write_json
from ..hf.loading import resolve_dtype
from ..tasks.examples import Examples
from ..tasks.task import Task
from .pool import run_jobs
from .report import html
from .result import Comparison, ComparisonSetup
from .settings import (
    BATCH_SIZE,
    METHODS,
    STEPS,
    VIRTUAL_TOKENS,
    WITHOUT_SEED,
    Job,
    check_methods,
    model_digest,
    resolve_options,
)
from .splits import clean_splits, label_counts, truth, write_splits
from .summary import summarise
from .verdict import verdict


def compare(
    model: str,
    task: Task,
    train_rows: Examples,
    validation_rows: Examples,
    test_rows: Examples,
    output: PathLike[str] | str,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    num_virtual_tokens: int = VIRTUAL_TOKENS,
    instruction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    jobs: int = 1,
    threads: int | None = None,
    timeout: float | None = None,
    data_name: str = "data",
    files: Mapping[str, str | None] | None = None,
    split_seed: int | None = None,
    console: Console | None = None,
) -> Comparison:
    """Compares methods on one task: the same model, template, label words, rows, steps and batch size for all.

    Each method and seed runs in a process of its own and writes ``output/runs/<method>-seed<seed>.json``. The same
    comparison run again uses the results that are there, so an interrupted one continues where it stopped. Writes
    ``results.json``, ``results.csv`` and ``report.html`` to ``output``, prompts and adapters to ``output/artifacts``.

    Args:
        model: folder or name, as for ``load_base_model``; a decoder.
        validation_rows: choose checkpoints and the probe's C. Texts that are also in the test rows are left out.
        test_rows: scored once per method and seed.
        methods: some of ``METHODS``; each is compared with ``"prompt"``.
        seeds: for initialisation, the order of rows and the choice of examples.
        instruction: text in front, for ``instruction`` and ``few-shot``. None: made of the label words.
        options: settings of single methods, such as ``{"lora": {"learning_rate": 1e-4}}``.
        jobs: processes in parallel. With more than one, each makes the others slower, so times are less reliable.
        threads: per process. None: torch's own choice, or an equal share of the cores if several run in parallel.
        timeout: seconds after which a job is ended and counts as failed. None: no limit.
        data_name: name of the data in the tables.
        files: where each split came from, for the report.
        split_seed: seed of the split into train, validation and test rows, for the report.

    Raises:
        ValueError: an unknown method or option, or rows that cannot be used. A job that fails raises nothing: the
            tables and the report say why.
    """
    console = console or Console(stderr=True)
    output = Path(output)
    chosen = check_methods(methods)
    seeds = list(dict.fromkeys(seeds))
    _check(seeds, jobs=jobs, steps=steps, batch_size=batch_size)
    if threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    own_options = _options_by_method(
        chosen, options or {}, task=task, steps=steps, virtual_tokens=num_virtual_tokens, instruction=instruction
    )
    splits, left_out = clean_splits(task, train_rows, validation_rows, test_rows)
    for reason, count in left_out.items():
        console.print(f"[yellow]{count} rows are left out of {escape(reason)}[/yellow]", highlight=False)
    dtype = _same_dtype(model, dtype, device, console)
    shared = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "task": task.to_json(),
        "batch_size": batch_size,
        "data": str((output / "data").resolve()),
        "data_digest": write_splits(output / "data", splits, task),
        "model_digest": model_digest(model),
    }
    every = [
        _job(output, method, seed, own_options[method], shared)
        for method in chosen
        for seed in (seeds[:1] if method in WITHOUT_SEED else seeds)
    ]
    results = _run(every, output, jobs, timeout, console)
    classification = task.kind == "classification"
    summaries = summarise(results, chosen, truth(task, splits["test"]) if classification else [])
    setup = ComparisonSetup(
        data=data_name,
        model=model,
        metric="accuracy" if classification else "loss per token",
        rows={name: len(rows) for name, rows in splits.items()},
        left_out=left_out,
        labels={name: label_counts(task, rows) for name, rows in splits.items()},
        seeds=seeds,
        steps=steps,
        batch_size=batch_size,
        task=task,
        dtype=dtype,
        jobs_at_once=max((r.get("jobs_at_once") or 1 for r in results), default=jobs),
        threads=threads,
        files=None if files is None else dict(files),
        split_seed=split_seed,
        **_environment(results),
    )
    comparison = Comparison(output, setup, summaries, results, verdict(summaries, task.kind))
    write_files(comparison)
    return comparison


def write_files(comparison: Comparison) -> None:
    """``results.json``, ``results.csv`` and ``report.html``."""
    write_json(comparison.folder / "results.json", comparison.to_json())
    write_atomically(comparison.folder / "results.csv", comparison.to_csv())
    write_atomically(comparison.folder / "report.html", html(comparison))


def _same_dtype(model: str, dtype: str, device: str | None, console: Console) -> str:
    """The dtype of all jobs. "auto" on a CPU is measured here, because jobs in parallel would disturb each other."""
    choice = resolve_dtype(model, dtype, device)
    if choice is None:
        return dtype
    console.print(f"the model runs in {choice.reason}", highlight=False, soft_wrap=True)
    return str(choice.dtype).removeprefix("torch.")


def _check(seeds: Sequence[int], **counts: int) -> None:
    if not seeds:
        raise ValueError("`seeds` must hold at least one seed, got none")
    for seed in seeds:
        if not SEED.holds(seed):
            raise ValueError(f"`seeds` must each be {SEED.text}, got {seed}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be positive, got {count}")


def _options_by_method(
    methods: Sequence[str], given: Mapping[str, Mapping[str, Any]], **shared: Any
) -> dict[str, dict[str, Any]]:
    """The settings of each method; an error names what cannot be used before anything runs."""
    check_methods([*given, *methods])
    if unused := [method for method in given if method not in methods]:
        raise ValueError(f"`options` must name methods that are compared, got {', '.join(unused)}")
    return {method: resolve_options(method, given.get(method, {}), **shared) for method in methods}


def _job(output: Path, method: str, seed: int, options: dict[str, Any], shared: dict[str, Any]) -> Job:
    name = f"{method}-seed{seed}"
    return Job(
        method=method,
        seed=seed,
        options=options,
        result=str((output / "runs" / f"{name}.json").resolve()),
        artifacts=str((output / "artifacts" / name).resolve()),
        **shared,
    )


def _run(
    every: Sequence[Job], output: Path, at_once: int, timeout: float | None, console: Console
) -> list[dict[str, Any]]:
    """The result of every job; prints a line as each comes."""
    done = 0

    def report(job: Job, result: dict[str, Any], reused: bool) -> None:
        nonlocal done
        done += 1
        console.print(
            f"[{done}/{len(every)}] {_line(job, result, reused)}", markup=False, highlight=False, soft_wrap=True
        )

    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0), console.status("") as status:
            return run_jobs(
                every, output, at_once=at_once, timeout=timeout, on_result=report, on_progress=status.update
            )
    except Timeout as error:
        raise OSError(f"another comparison is writing to {output}; choose another output folder") from error


def _environment(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The setup's fields that only the jobs know."""
    known = [r for r in results if "environment" in r]
    if not known:
        return {}
    return {
        "model_facts": known[0].get("model", {}),
        "environment": known[0]["environment"],
        "same_environment": all(r["environment"] == known[0]["environment"] for r in known),
    }


def _line(job: Job, result: dict[str, Any], reused: bool) -> str:
    name = job.method if job.method in WITHOUT_SEED else f"{job.method}, seed {job.seed}"
    if result["status"] != "ok":
        return f"{name}: {result['status']}: {result['reason']}"
    summary = result["summary"]
    key = "accuracy" if "accuracy" in summary else "loss"
    times = f"trained in {result['train_seconds']:.1f} s, " if result["train_seconds"] else ""
    before = " (from an earlier run)" if reused else ""
    return f"{name}: {key} {summary[key]:.4f}, {times}scored in {result['inference_seconds']:.1f} s{before}"
