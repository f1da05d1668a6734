"""The runner of `make gpu`: no step stops another, and what became of each is said and written."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_run() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu_run")
    finally:
        sys.path.remove(str(BENCHMARKS))


def outcomes(folder: Path) -> dict[str, str]:
    with (folder / "steps.csv").open() as file:
        return {row["step"]: row["outcome"] for row in csv.DictReader(file)}


def python(gpu_run: Any, code: str) -> list[str]:
    return [gpu_run.PYTHON, "-c", code]


def test_no_step_stops_another(gpu_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        gpu_run.Step("broken", 60, python(gpu_run, "print('why'); raise SystemExit(3)")),
        gpu_run.Step("hangs", 1, python(gpu_run, "import time; time.sleep(600)")),
        gpu_run.Step("absent", 60, python(gpu_run, ""), needs="no-such-program"),
        gpu_run.Step("skipped", 60, python(gpu_run, "print('2 skipped')"), must_say=r"\d+ passed"),
        gpu_run.Step("good", 60, python(gpu_run, "open(r'{csv}', 'w').write('a,b\\n1,2\\n'); print('3 passed')")),
    ]
    assert gpu_run.run_all(chosen, "cpu", 600, tmp_path, patience=1) == 1
    assert outcomes(tmp_path) == {
        "broken": "failed with exit status 3",
        "hangs": "stopped after 1 s",
        "absent": "left out: no-such-program is not installed",
        "skipped": "failed: no test ran",
        "good": "passed",
    }
    said = capsys.readouterr().out
    assert "  | why\n" in said and said.splitlines()[-1] == "failed: broken, hangs, skipped; left out: absent"
    assert (tmp_path / "good.csv").read_text() == "a,b\n1,2\n" and (tmp_path / "good.log").read_text() == "3 passed\n"


def test_a_step_without_time_is_left_out(gpu_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [gpu_run.Step("late", 60, python(gpu_run, ""))]
    assert gpu_run.run_all(chosen, "cpu", 1, tmp_path) == 0
    assert outcomes(tmp_path) == {"late": "left out: no time left"}
    assert capsys.readouterr().out.endswith("failed: nothing; left out: late\n")


def test_the_compiler_s_output_is_kept(gpu_run: Any, tmp_path: Path) -> None:
    log = tmp_path / "cache" / "build" / "key.failed.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: no such thing")
    gpu_run.keep_failed_builds(tmp_path)
    assert (tmp_path / "compiler.log").read_text() == "error: no such thing"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_file_of_a_step_exists(gpu_run: Any, device: str) -> None:
    files = [
        part for step in gpu_run.steps(device) for part in step.command if part.startswith(("tests/", "benchmarks/"))
    ]
    assert files and all((BENCHMARKS.parent / file).exists() for file in files)
