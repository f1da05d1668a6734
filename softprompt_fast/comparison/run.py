"""The comparison, start to end: splits and jobs -> results -> tables and a report."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from ..base.files import write_atomically, write_json
from ..tasks.examples import Examples
from ..tasks.task import Task
from .files import clean_splits, truth, write_splits
from .pool import run_jobs
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
from .summary import MethodSummary, summarise
from .verdict import RULES, verdict

COLUMNS = (
    "data",
    "model",
    "method",
    "status",
    "metric",
    "score",
    "score_sd",
    "score_low",
    "score_high",
    "interval",
    "loss",
    "loss_low",
    "loss_high",
    "macro_f1",
    "difference",
    "p",
    "p_holm",
    "test",
    "seeds",
    "train_rows",
    "validation_rows",
    "test_rows",
    "trainable_parameters",
    "stored_bytes",
    "prefix_tokens",
    "text_tokens",
    "train_seconds",
    "evaluation_seconds",
    "inference_seconds_per_1000",
    "flops_per_row",
    "flops_per_row_cached",
    "memory_loaded",
    "memory_training",
    "memory_inference",
    "reason",
)


@dataclass
class Comparison:
    """What came of a comparison; the files of ``folder`` say the same."""

    folder: Path
    facts: dict[str, Any]
    """Model, task, rows, seeds, versions, hardware."""
    summaries: list[MethodSummary]
    results: list[dict[str, Any]]
    """Of every job, as in ``runs/``."""
    verdict: str

    def __getitem__(self, method: str) -> MethodSummary:
        for summary in self.summaries:
            if summary.method == method:
                return summary
        raise KeyError(f"{method!r} is not among the methods compared: {[s.method for s in self.summaries]}")

    def to_json(self) -> dict[str, Any]:
        """Without the rows' predictions, which ``runs/`` holds."""
        jobs = [{key: value for key, value in result.items() if key != "rows"} for result in self.results]
        return {
            **self.facts,
            "verdict": self.verdict,
            "rules": list(RULES),
            "methods": [summary.to_json() for summary in self.summaries],
            "jobs": jobs,
        }

    def to_csv(self) -> str:
        """One line per method; tables of several comparisons can be joined as they are."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        shared = {name: self.facts[name] for name in ("data", "model", "metric")}
        shared |= {f"{name}_rows": count for name, count in self.facts["rows"].items()}
        for summary in self.summaries:
            own = {name: value for name, value in summary.to_json().items() if name in COLUMNS}
            own |= {"seeds": " ".join(map(str, summary.seeds)), "reason": "; ".join(summary.reasons)}
            writer.writerow(shared | own)
        return stream.getvalue()


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
    facts: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Comparison:
    """Compares methods on one task: the same model, template, label words, rows, steps and batch size for all.

    Each method and seed runs in a process of its own. Its result lands in ``output/runs/<method>-seed<seed>.json`` and
    is used again when the same comparison runs once more, so an interrupted one goes on where it stopped. Leaves
    ``results.json``, ``results.csv`` and ``report.html`` in ``output``, prompts and adapters in ``output/artifacts``.

    Args:
        model: folder or name, as for ``load_base_model``; a decoder.
        validation_rows: choose checkpoints and the probe's C. Texts that stand in the test rows are left out.
        test_rows: scored once per method and seed.
        methods: some of ``METHODS``; comparisons are with ``"prompt"``.
        seeds: of initialisations, orders of rows and the choice of examples.
        instruction: text in front, for ``instruction`` and ``few-shot``; None: made of the label words.
        options: settings of single methods, such as ``{"lora": {"learning_rate": 1e-4}}``.
        jobs: processes at once; more than one disturb each other's times.
        threads: per process; None: torch's own choice, or an equal share of the cores where several run at once.
        timeout: seconds after which a job is ended and counts as failed; None: never.
        data_name: what the rows are called in the tables.
        facts: what else the report should say of the data.

    Raises:
        ValueError: an unknown method or option, or rows that cannot be used. What fails in a job raises nothing: the
            tables say so.
    """
    console = console or Console(stderr=True)
    output = Path(output)
    chosen = check_methods(methods)
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError("`seeds` must hold at least one seed, got none")
    for name, number in (("jobs", jobs), ("steps", steps), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"`{name}` must be positive, got {number}")
    if threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    given = dict(options or {})
    check_methods([*given, *chosen])
    if idle := [method for method in given if method not in chosen]:
        raise ValueError(f"`options` must be of methods that are compared, got some of {', '.join(idle)}")
    splits, left_out = clean_splits(task, train_rows, validation_rows, test_rows)
    for reason, count in left_out.items():
        console.print(f"[yellow]{count} rows are left out of {escape(reason)}[/yellow]", highlight=False)
    digest = write_splits(output / "data", splits, task)
    every: list[Job] = []
    for method in chosen:
        own = resolve_options(
            method,
            given.get(method, {}),
            task=task,
            steps=steps,
            virtual_tokens=num_virtual_tokens,
            instruction=instruction,
        )
        for seed in seeds[:1] if method in WITHOUT_SEED else seeds:
            name = f"{method}-seed{seed}"
            every.append(
                Job(
                    method=method,
                    seed=seed,
                    model=model,
                    dtype=dtype,
                    device=device,
                    threads=threads,
                    task=asdict(task),
                    options=own,
                    batch_size=batch_size,
                    data=str((output / "data").resolve()),
                    data_digest=digest,
                    model_digest=model_digest(model),
                    result=str((output / "runs" / f"{name}.json").resolve()),
                    artifacts=str((output / "artifacts" / name).resolve()),
                )
            )
    done = 0
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)

    def report(job: Job, result: dict[str, Any], reused: bool) -> None:
        nonlocal done
        done += 1
        console.print(
            f"[{done}/{len(every)}] {_line(job, result, reused)}", markup=False, highlight=False, soft_wrap=True
        )

    try:
        with lock, console.status("") as status:
            results = run_jobs(every, output, at_once=jobs, timeout=timeout, report=report, watch=status.update)
    except Timeout as error:
        raise OSError(f"another comparison is writing to {output}; choose another output folder") from error
    metric = "accuracy" if task.kind == "classification" else "loss per token"
    labels = truth(task, splits["test"]) if task.kind == "classification" else []
    summaries = summarise(results, chosen, labels)
    known = next((r for r in results if "environment" in r), {})
    everything: dict[str, Any] = {
        "data": data_name,
        "model": model,
        "metric": metric,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "left_out": left_out,
        "labels": {
            name: {label: sum(value == label for value in truth(task, rows)) for label in task.labels}
            for name, rows in splits.items()
        },
        "seeds": seeds,
        "steps": steps,
        "batch_size": batch_size,
        "task": asdict(task),
        "dtype": dtype,
        "jobs_at_once": max((r.get("jobs_at_once") or 1 for r in results), default=jobs),
        "threads": threads,
        "model_facts": known.get("model", {}),
        "environment": known.get("environment", {}),
        "same_environment": all(r["environment"] == known["environment"] for r in results if "environment" in r),
        **(facts or {}),
    }
    found = Comparison(output, everything, summaries, results, verdict(summaries, task.kind))
    write_files(found)
    return found


def write_files(found: Comparison) -> None:
    """``results.json``, ``results.csv`` and ``report.html``."""
    from .report import html

    write_json(found.folder / "results.json", found.to_json())
    write_atomically(found.folder / "results.csv", found.to_csv())
    write_atomically(found.folder / "report.html", html(found))


def _line(job: Job, result: dict[str, Any], reused: bool) -> str:
    name = job.method if job.method in WITHOUT_SEED else f"{job.method}, seed {job.seed}"
    if result["status"] != "ok":
        return f"{name}: {result['status']}: {result['reason']}"
    summary = result["summary"]
    key = "accuracy" if "accuracy" in summary else "loss"
    times = f"trained in {result['train_seconds']:.1f} s, " if result["train_seconds"] else ""
    before = " (from an earlier run)" if reused else ""
    return f"{name}: {key} {summary[key]:.4f}, {times}scored in {result['inference_seconds']:.1f} s{before}"
