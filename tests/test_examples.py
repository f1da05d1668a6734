"""The scripts in ``examples/`` run from start to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_reviews import reviews

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="not a source tree")


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Path]:
    """A folder with a ``softprompt-fast`` that starts quickly."""
    server, address = ROOT / "tests" / "support" / "quick_commands.py", tmp_path / "socket"
    command = tmp_path / "bin" / "softprompt-fast"
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -S {server} call {address} "$@"\n')
    command.chmod(0o755)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, server, "serve", address], env=os.environ | {"PYTHONPATH": paths})
    while not address.exists() and process.poll() is None:
        time.sleep(0.05)
    yield command.parent
    process.kill()
    process.wait()


def test_versions_in_production(tmp_path: Path, model_folder: Path, commands: Path) -> None:
    """With a tiny model; tweets are longer, and what they call a good film the movie reviews call a bad one."""
    swapped = {"yes": "no", "no": "yes"}
    movies = [row | {"text": f"{row['text']} {place}"} for place, row in enumerate(reviews(380))]
    tweets = [row | {"text": f"{row['text']} a b c d e f", "label": swapped[row["label"]]} for row in movies]
    for name, rows in (("movies", movies), ("tweets", tweets)):
        for file, part in ((f"{name}.jsonl", rows[:320]), (f"{name}-new.jsonl", rows[320:])):
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in part))
    variables = {"MODEL": str(model_folder), "STEPS": "2", "DATA": str(tmp_path), "OUT": str(tmp_path / "out")}
    variables["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    script = ROOT / "examples" / "production.sh"
    done = subprocess.run([script], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sentiment@production is sentiment@1 now; it was sentiment@2" in done.stderr
    assert done.stdout.count("exit status ") == 2 and (tmp_path / "out" / "alarm.html").is_file()
    quiet, alarm = done.stdout.split("The traffic changes")
    assert "exit status 0" in quiet and "exit status 1" in alarm
    assert "2 versions, 0 faults" in done.stderr and "answers changed" in done.stdout
