"""The study behind the default recipe: one row of CSV per run; finished runs are not repeated.

    python benchmarks/study_recipes.py --csv benchmarks/results/recipes_cpu.csv --jobs 2 --studies init learning_rate

Each run is a process of its own with one thread, so that `--jobs` runs share the cores evenly. Rows of a
domain are split once: 1,000 test rows, 200 that choose the best state, the rest to train. `train_seconds` leaves the
evaluations out, and means little where other work ran beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

FIELDS = [
    "study", "model", "domain", "variant", "settings", "seed", "steps", "best_step", "validation_accuracy",
    "test_accuracy", "test_low", "test_high", "test_loss", "last_test_accuracy", "trained_numbers", "train_seconds",
    "curve",
]  # fmt: skip
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHORT: dict[str, Any] = {"steps": 40, "eval_every": 20}
"""Of the studies that only compare; the default has 120 steps."""
TWEETS_TEXT = "Decide whether the following tweet is negative or positive about what it is written about.\n"


def studies() -> dict[str, list[dict[str, Any]]]:
    """Runs by study: ``variant``, ``domain`` and what differs from the defaults."""

    def runs(domain: str, variants: dict[str, dict[str, Any]], seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
        return [
            {"variant": name, "domain": domain, "settings": settings | {"seed": seed}}
            for seed in seeds
            for name, settings in variants.items()
        ]

    def short(variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        return runs("tweets", {name: SHORT | settings for name, settings in variants.items()})

    forms = ("none", "residual")
    rates = {f"{f} {r:g}": {"learning_rate": r, "reparameterization": f} for r in RATES for f in forms}
    starts = ("vocabulary", "class_labels", "random")
    return {
        "default": runs("movies", {"default": {}}, (0, 1, 2)),
        "default_rate": runs("movies", {f"{rate:g}": {"learning_rate": rate} for rate in (3e-3, 3e-2)}, (0, 1)),
        "learning_rate": short(rates),
        "init": short(
            {init: {"init": init} for init in starts} | {"tweets text": {"init": "text", "init_text": TWEETS_TEXT}}
        ),
        "objective": short({"vocabulary": {"objective": "vocabulary"}}),
        "deep": short({f"deep {rate:g}": {"deep": True, "learning_rate": rate} for rate in (1e-3, 1e-2)}),
        "placement": short({"after_bos": {"placement": "after_bos"}}),
        "optimizer": short(
            {
                "adafactor 0.3 constant": {"optimizer": "adafactor", "learning_rate": 0.3, "schedule": "constant"},
                "adafactor 0.03": {"optimizer": "adafactor", "learning_rate": 0.03},
                "constant": {"schedule": "constant"},
                "linear": {"schedule": "linear"},
            }
        ),
        "form": short(
            {
                "low-rank 4": {"reparameterization": "low-rank", "rank": 4},
                "decay 0.1": {"decay_to_initial": 0.1},
                "dropout 0.1": {"prompt_dropout": 0.1},
                "norm bound 2": {"norm_bound": 2.0},
                "smoothing 0.1": {"label_smoothing": 0.1},
            }
        ),
        "label_words": short({"bad, good": {"words": {"negative": " bad", "positive": " good"}}}),
        "batch": runs(
            "tweets", {f"batch {b}": {"batch_size": b, "steps": 1280 // b, "eval_every": 640 // b} for b in (8, 64)}
        ),
        "length": short({f"{p} tokens": {"num_virtual_tokens": p} for p in (1, 5, 50, 100)}),
        "encoder_default": [
            run
            for domain in ("movies", "products", "editorials", "tweets")
            for run in runs(domain, {"prompt and head": {}, "head alone": {"prompt": False}})
        ],
        "encoder_rate": runs("movies", rates),
        "encoder_init": runs("movies", {init: {"init": init} for init in ("text", *starts)}),
        "encoder_length": runs("movies", {f"{p} tokens": {"num_virtual_tokens": p} for p in (1, 5, 50)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--studies", nargs="*", default=list(studies()))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run = json.loads(arguments.one)
        if run["study"].startswith("encoder"):
            from study_encoder import run_encoder

            print(json.dumps(run_encoder(run)))
        else:
            print(json.dumps(run_one(run)))
        return
    done = set()
    if arguments.csv.is_file():
        with arguments.csv.open() as file:
            done = {(row["study"], row["domain"], row["variant"], row["seed"]) for row in csv.DictReader(file)}
    waiting = [
        {"study": study, **run}
        for study in arguments.studies
        for run in studies()[study]
        if (study, run["domain"], run["variant"], str(run["settings"]["seed"])) not in done
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for finished in as_completed([pool.submit(in_process, run) for run in waiting]):
            append(arguments.csv, finished.result())


def in_process(run: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--csv", os.devnull, "--one", json.dumps(run)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        print(f"{run}: failed\n{found.stderr[-2000:]}", file=sys.stderr)
        return {}
    row = json.loads(found.stdout.splitlines()[-1])
    print({key: row[key] for key in ("study", "domain", "variant", "seed", "test_accuracy", "train_seconds")})
    return row


def append(path: Path, row: dict[str, Any]) -> None:
    if not row:
        return
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def run_one(run: dict[str, Any]) -> dict[str, Any]:
    """One prompt tuned and scored."""
    import torch

    import softprompt_fast as spf
    from softprompt_fast.deep_prompt import DeepPromptModel
    from softprompt_fast.task import Task
    from softprompt_fast.tuning import evaluate, load_base_model, tune
    from softprompt_fast.tuning.demo import LABEL_WORDS, TEMPLATE, balanced, sentiment_rows
    from softprompt_fast.tuning.models import SMOLLM2

    torch.set_num_threads(1)
    settings = dict(run["settings"])
    deep = settings.pop("deep", False)
    words = settings.pop("words", LABEL_WORDS)
    rest, test = balanced(sentiment_rows(run["domain"]), 1000, seed=0)
    train, validation = balanced(rest, 200, seed=1)
    model, tokenizer = load_base_model(SMOLLM2, device="cpu")
    tuned = (DeepPromptModel if deep else spf.SoftPromptModel)(model)
    task = Task("classification", TEMPLATE, "label", words, max_length=128, model=SMOLLM2, prompt=run["domain"])
    with tempfile.TemporaryDirectory() as folder:
        result = tune(tuned, tokenizer, task, train, validation, folder, **settings)
        scores = evaluate(tuned, tokenizer, task, test)
        last = max(Path(folder, "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        with torch.no_grad():
            tuned.prompts[task.prompt].copy_(tuned.read_prompt(last / task.prompt))
        last_scores = evaluate(tuned, tokenizer, task, test) if result.best_step != result.steps else scores
    return {
        "study": run["study"],
        "model": SMOLLM2,
        "domain": run["domain"],
        "variant": run["variant"],
        "settings": json.dumps(run["settings"]),
        "seed": run["settings"]["seed"],
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_accuracy": round(result.after["accuracy"], 4),
        "test_accuracy": round(scores["accuracy"], 4),
        "test_low": round(scores["accuracy_low"], 4),
        "test_high": round(scores["accuracy_high"], 4),
        "test_loss": round(scores["loss"], 4),
        "last_test_accuracy": round(last_scores["accuracy"], 4),
        "trained_numbers": tuned.prompts[task.prompt].numel(),
        "train_seconds": round(result.tuning_seconds - result.evaluation_seconds),
        "curve": json.dumps([[int(h["step"]), round(h["accuracy"], 3), round(h["loss"], 4)] for h in result.history]),
    }


if __name__ == "__main__":
    main()
