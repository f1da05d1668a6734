"""Runs each job in its own process. Reuses stored results. Ends every process it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.files import read_json, write_atomically, write_json
from .settings import RESULT_FORMAT, Job

WORKER = ["-m", "softprompt_fast.comparison.worker"]
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
LOG_LINES = 5
ResultCallback = Callable[[Job, dict[str, Any], bool], None]
"""Receives a job, its result, and whether the result was stored by an earlier run."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def stored_result(job: Job) -> dict[str, Any] | None:
    """The stored result of the same job with the same data; None: there is none, or it is a failure."""
    result = read_json(Path(job.result))
    if result is None or result.get("key") != job.key() or result.get("status") not in ("ok", "not applicable"):
        return None
    return result


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    at_once: int = 1,
    timeout: float | None = None,
    on_result: ResultCallback | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Results in the order of the jobs. The result of a job that failed says why.

    Args:
        folder: for job files and logs.
        at_once: most processes in parallel.
        timeout: seconds that one job may take. None: no limit.
        on_result: called with each result when it is ready.
        on_progress: called several times a second with a text that names the running jobs.
    """
    results: dict[str, dict[str, Any]] = {}
    waiting: list[Job] = []
    for job in jobs:
        stored = stored_result(job)
        if stored is None:
            waiting.append(job)
        else:
            results[job.name] = stored
            if on_result is not None:
                on_result(job, stored, True)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0), folder))
            for one in list(running):
                late = timeout is not None and time.monotonic() - one.started > timeout
                if one.process.poll() is None and not late:
                    continue
                if late:
                    _stop([one])
                running.remove(one)
                results[one.job.name] = result = _collect(one, at_once, timeout if late else None)
                if on_result is not None:
                    on_result(one.job, result, False)
            if on_progress is not None:
                on_progress(", ".join(f"{one.job.name} ({time.monotonic() - one.started:.0f} s)" for one in running))
            time.sleep(POLL_SECONDS)
    finally:
        _stop(running)
    return [results[job.name] for job in jobs]


def _start(job: Job, folder: Path) -> _Running:
    file, log = folder / "jobs" / f"{job.name}.json", folder / "logs" / f"{job.name}.log"
    write_atomically(file, json.dumps(asdict(job), indent=1, ensure_ascii=False) + "\n")
    log.parent.mkdir(parents=True, exist_ok=True)
    Path(job.result).unlink(missing_ok=True)  # it has other settings or is a failure
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")
    if job.threads is not None:
        environment |= {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # The process must find this package even where only sys.path led to it.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [sys.executable, *WORKER, str(file)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )
    return _Running(job, process, log, time.monotonic())


def _collect(one: _Running, at_once: int, timeout: float | None) -> dict[str, Any]:
    """The result that a process wrote, or one that says how the process ended."""
    result = read_json(Path(one.job.result))
    if result is None or result.get("key") != one.job.key():
        status = one.process.returncode
        if timeout is not None:
            reason = f"took longer than {timeout:.0f} s"
        elif status is not None and status < 0:
            reason = f"ended by signal {-status} ({signal.Signals(-status).name})"
            if -status == signal.SIGKILL:
                reason += "; the machine may be out of memory"
        else:
            reason = f"ended with status {status} and no result"
        tail = _tail(one.log)
        result = {
            "format": RESULT_FORMAT,
            "key": one.job.key(),
            "method": one.job.method,
            "seed": one.job.seed,
            "options": one.job.options,
            "status": "error",
            "reason": reason + (f": {tail}" if tail else ""),
        }
    result["jobs_at_once"] = at_once
    result["wall_seconds"] = time.monotonic() - one.started
    write_json(Path(one.job.result), result)
    return result


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:])
    return ""


def _stop(running: Sequence[_Running]) -> None:
    """Ends processes and everything that they started."""
    for one in running:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(one, signal.SIGKILL)
            one.process.wait()


def _signal(one: _Running, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process.pid, number)
