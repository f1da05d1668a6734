"""Everything that a short time on a GPU can tell, most useful first: `make gpu` runs this.

Each step is a process with a time limit, a log and a CSV file of its own; a step that fails or takes too long does not
stop the others. `steps.csv` says what became of each. `--device cpu` rehearses the same with tiny sizes. Usage::

    python benchmarks/gpu_run.py --output gpu-results [--steps build,smoke] [--budget 420]
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import Row, append_rows

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
LEAST_SECONDS = 5
"""A step with less time left does not start."""
TOGETHER = 4
"""Steps that run at the same time."""
REHEARSAL = 10
"""A rehearsal waits this many times as long for a step."""
BUILD = """
import sys, time, torch
from softprompt_fast.ops.extension import backend
start = time.perf_counter()
state, device = backend.state(), torch.device(sys.argv[1])
print(f"{time.perf_counter() - start:.1f} s to compile and load;", state, flush=True)
if backend.ops_for(device) is None:
    sys.exit(f"the extension has no part for {device}")
"""


@dataclass(frozen=True)
class Step:
    """What one process does.

    Attributes:
        limit: seconds after which it is stopped.
        command: its arguments; `{csv}` is its CSV file.
        needs: a program without which it is left out.
        must_say: a regular expression that its log must match. Tests that were all skipped are no success.
        variables: environment variables.
    """

    name: str
    limit: float
    command: Sequence[str]
    needs: str | None = None
    must_say: str | None = None
    variables: tuple[tuple[str, str], ...] = ()
    timed: bool = True
    """Whether it measures times. Neighbours that do not run at the same time."""


def steps(device: str) -> list[Step]:
    """The steps in their order. On a CPU the same with tiny sizes."""
    gpu = device == "cuda"
    model, dtype = ("llama-1b", "bfloat16") if gpu else ("llama-tiny", "float32")
    train_shapes = "100,32,64;20,32,128" if gpu else "10,4,16"
    op_shapes = "20,16,1024,4096;20,4,1024,4096;100,16,128,1024;20,1,64,576" if gpu else "20,1,64,576"
    tasks, rounds = ("64", "5") if gpu else ("4", "1")
    smoke = [PYTHON, "tests/ops/cuda/smoke.py", "--device", device]
    train = [PYTHON, "benchmarks/bench_train.py", "--device", device, "--dtype", dtype, "--rounds", rounds]
    train += [] if gpu else ["--no-memory"]
    op = [PYTHON, "benchmarks/bench_op.py", "--device", device, "--csv", "{csv}"]
    op += [] if gpu else ["--quick"]
    serve = [PYTHON, "benchmarks/bench_serve.py", "--model", model, "--dtype", dtype, "--device", device]
    serve += ["--tasks", tasks, "--requests", tasks, "--virtual-tokens", "20", "--jobs", "generate", "--skip-resident"]
    serve += ["--peft-requests", "8"]  # 64 would take minutes
    peft = [PYTHON, "benchmarks/bench_peft_inplace.py", "--device", device, "--model", model, "--dtype", dtype]
    first = [PYTHON, "benchmarks/bench_first_token.py", "--device", device, "--model", model, "--dtype", dtype]
    first += [] if gpu else ["--texts", "40", "--rounds", "1"]
    tests = [PYTHON, "-m", "pytest", "-m", "cuda", "-v", "-p", "no:cacheprovider", "-W", "ignore::UserWarning"]
    op_tests = [
        "tests/ops/packing",
        "tests/ops/segment_attention/test_varlen.py",
        "tests/ops/test_hostile_arguments.py",
    ]
    op_tests += ["tests/ops/cuda/test_cuda.py"]
    op_tests += [] if gpu else ["-k", "not equals_the_twin and not gradients"]
    model_tests = ["tests/packed/test_packed_on_gpu.py", "tests/models/test_results_on_gpu.py"]
    on_device = (("SOFTPROMPT_FAST_TEST_DEVICE", device),)
    checker = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool"]
    alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that each tensor is an allocation with bounds
    return [
        Step("build", 120, [PYTHON, "-c", BUILD, device]),
        Step("smoke", 40, [*smoke, "--csv", "{csv}"]),
        Step("train", 90, [*train, "--model", model, "--shapes", train_shapes, "--profile", "--output", "{csv}"]),
        Step(
            "op",
            60,
            [*op, "--providers", "eager,ours,clone", "--dtypes", "bf16", "--shapes", op_shapes, "--rounds", "3"],
        ),
        Step("generate", 60, [*serve, "--rounds", rounds, "--profile", "--output", "{csv}"]),
        Step("peft", 60, [*peft, "--rounds", rounds, "--output", "{csv}"]),
        Step("first-token", 40, [*first, "--output", "{csv}"]),
        Step("op-tests", 120, [*tests, *op_tests], must_say=r"\d+ passed", variables=on_device, timed=False),
        Step("model-tests", 120, [*tests, *model_tests], must_say=r"\d+ passed", variables=on_device, timed=False),
        *(
            Step(tool, 120, [*checker, tool, *smoke], needs=checker[0], variables=alone, timed=False)
            for tool in ("memcheck", "racecheck")
        ),
        # What compiles for minutes comes last.
        Step(
            "compiled",
            150,
            [*train, "--model", model, "--shapes", train_shapes, "--compile", "--no-memory", "--output", "{csv}"],
        ),
        Step("op-compiled", 120, [*op, "--dtypes", "bf16", "--shapes", op_shapes, "--rounds", "3"]),
    ]


def run(step: Step, seconds: float, output: Path) -> str:
    """Runs a step for at most `seconds`; returns "passed", or what went wrong."""
    log, table = output / f"{step.name}.log", output / f"{step.name}.csv"
    table.unlink(missing_ok=True)
    command = [part.replace("{csv}", str(table)) for part in step.command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(output) | dict(step.variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a hung device call cannot be interrupted from Python
            process.wait()
            return f"stopped after {seconds:.0f} s"
    if status != 0:
        return f"failed with exit status {status}"
    if step.must_say and not re.search(step.must_say, log.read_text(errors="replace")):
        return "failed: no test ran"
    return "passed"


def _environment(output: Path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    # The extension is compiled for the card that is there, whatever the machine's list of architectures says.
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "SOFTPROMPT_FAST_CACHE": os.environ.get("SOFTPROMPT_FAST_CACHE", str(output / "cache")),
    }


def keep_failed_builds(output: Path) -> None:
    """Copies the compiler's output, so that it is not lost with the machine."""
    for log in (output / "cache").glob("**/*.failed.log"):
        shutil.copy(log, output / "compiler.log")


def card(device: str) -> Row:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
    return {"device": name, "torch": torch.__version__}


def run_all(chosen: Sequence[Step], device: str, budget: float, output: Path, patience: float = 1) -> int:
    """Runs the steps within `budget` seconds, each for `patience` times its limit; returns the exit status."""
    output.mkdir(parents=True, exist_ok=True)
    facts, end = card(device), time.monotonic() + budget
    (output / "steps.csv").unlink(missing_ok=True)
    outcomes: dict[str, str] = {}
    lock = threading.Lock()

    def one(step: Step) -> None:
        start = time.monotonic()
        left = end - start
        if step.needs and shutil.which(step.needs) is None:
            outcome = f"left out: {step.needs} is not installed"
        elif left < LEAST_SECONDS:
            outcome = "left out: no time left"
        else:
            outcome = run(step, min(step.limit * patience, left), output)
        seconds = time.monotonic() - start
        with lock:
            note(step, outcome, seconds)

    def note(step: Step, outcome: str, seconds: float) -> None:
        append_rows(
            output / "steps.csv", [{**facts, "step": step.name, "seconds": round(seconds, 1), "outcome": outcome}]
        )
        failed = outcome != "passed" and not outcome.startswith("left out")
        tail = "".join(f"  | {line}\n" for line in _tail(output / f"{step.name}.log")) if failed else ""
        print(f"{step.name}: {outcome} ({seconds:.0f} s)\n{tail}", end="", flush=True)
        outcomes[step.name] = outcome
        keep_failed_builds(output)

    for timed, neighbours in itertools.groupby(chosen, lambda step: step.timed):
        with ThreadPoolExecutor(1 if timed else TOGETHER) as pool:
            list(pool.map(one, neighbours))
    left_out = [name for name, outcome in outcomes.items() if outcome.startswith("left out")]
    failed = [name for name, outcome in outcomes.items() if name not in left_out and outcome != "passed"]
    print(f"failed: {', '.join(failed) or 'nothing'}; left out: {', '.join(left_out) or 'nothing'}")
    return 1 if failed else 0


def _tail(log: Path, lines: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:] if log.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--steps", help="of them, such as build,smoke; default: all")
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything")
    arguments = parser.parse_args()
    known = {step.name: step for step in steps(arguments.device)}
    names = [name.strip() for name in arguments.steps.split(",")] if arguments.steps else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--steps must be of {', '.join(known)}, got {', '.join(unknown)}")
    chosen, patience = [known[name] for name in names], 1 if arguments.device == "cuda" else REHEARSAL
    sys.exit(run_all(chosen, arguments.device, arguments.budget, arguments.output.resolve(), patience))


if __name__ == "__main__":
    main()
