"""The study behind the default recipe: one CSV row per run; finished runs are not repeated.

    python benchmarks/study_recipes.py --csv benchmarks/results/recipes_cpu.csv --jobs 2 --studies init learning_rate

Each run is a separate process with one thread, so that `--jobs` runs share the cores evenly. Rows of a domain are split
once: 1,000 test rows, 200 that choose the best checkpoint, the rest for training. `train_seconds` does not include
evaluations, and means little if other work ran at the same time. `other_test_accuracy` holds the score of a default
run's last checkpoint, or of each member of an ensemble. "transfer" needs STUDY_PROMPTS, a folder with a tuned prompt of
each domain.
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

from common import append_rows, argument_parser, last_line

FIELDS = [
    "study", "model", "domain", "variant", "settings", "seed", "steps", "best_step", "validation_accuracy",
    "test_accuracy", "test_low", "test_high", "test_loss", "other_test_accuracy", "trained_numbers", "train_seconds",
    "curve",
]  # fmt: skip
RATES = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)
SHORT: dict[str, Any] = {"steps": 40, "eval_every": 20}
"""For studies that only compare; the default has 120 steps."""
QUICK: dict[str, Any] = {"steps": 20, "eval_every": 10}
TWEETS_TEXT = "Decide whether the following tweet is negative or positive about what it is written about.\n"


def studies() -> dict[str, list[dict[str, Any]]]:
    """Runs by study: ``variant``, ``domain`` and the settings that differ from the defaults."""

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
        "default_rate": runs("movies", {f"{rate:g}": {"learning_rate": rate} for rate in (3e-3, 1e-2)}, (0, 1, 2)),
        "default_form": runs("tweets", {form: {"reparameterization": form} for form in forms}, (0, 1)),
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
        "length": runs(
            "movies", {f"{p} tokens": {"num_virtual_tokens": p, "learning_rate": 1e-2} for p in (1, 5, 50, 100)}
        ),
        "ensemble": short({"3 members": {"members": 3}}),
        "several": runs(
            "all", {"4 tasks": SHORT, "4 tasks, 8 of 20 shared": SHORT | {"num_virtual_tokens": 12, "shared_tokens": 8}}
        ),
        "transfer": [
            run
            for domain, source in (("products", "movies"), ("editorials", "movies"), ("tweets", "products"))
            for run in runs(domain, {"auto, 20 steps": QUICK, f"from {source}, 20 steps": QUICK | {"from": source}})
        ],
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
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--studies", nargs="*", default=list(studies()))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run = json.loads(arguments.one)
        if run["study"].startswith("encoder"):
            from study_encoder import run_encoder

            print(json.dumps([run_encoder(run)]))
        else:
            print(json.dumps(run_one(run)))
        return
    done = set()
    if arguments.csv.is_file():
        with arguments.csv.open() as file:
            rows = list(csv.DictReader(file))
            done = {(row["study"], domain, row["settings"]) for row in rows for domain in (row["domain"], "all")}
    waiting = [
        {"study": study, **run}
        for study in arguments.studies
        for run in studies()[study]
        if (study, run["domain"], json.dumps(run["settings"])) not in done
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for finished in as_completed([pool.submit(in_process, run) for run in waiting]):
            append_rows(arguments.csv, finished.result(), FIELDS)


def in_process(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one run; none if it failed."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--csv", os.devnull, "--one", json.dumps(run)]
    try:
        rows: list[dict[str, Any]] = json.loads(last_line(__file__, *options, quiet=True, variables=variables))
    except subprocess.CalledProcessError as error:
        print(f"{run}: failed\n{error.stderr[-2000:]}", file=sys.stderr)
        return []
    for row in rows:
        shown = ("study", "domain", "variant", "seed", "test_accuracy", "train_seconds")
        print({key: row[key] for key in shown}, flush=True)
    return rows


def run_one(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Tunes and scores the prompts of one run: one, the members of an ensemble, or one for each domain."""
    import torch

    import softprompt_fast as spf
    from softprompt_fast.demo import DOMAINS, LABEL_WORDS, TEMPLATE, balanced, sentiment_rows
    from softprompt_fast.evaluation import evaluate, evaluate_ensemble
    from softprompt_fast.hf import SMOLLM2, load_base_model
    from softprompt_fast.tasks import Task
    from softprompt_fast.tuning import TuningJob, tune_ensemble, tune_tasks

    torch.set_num_threads(1)
    settings = dict(run["settings"])
    deep, words = settings.pop("deep", False), settings.pop("words", LABEL_WORDS)
    members, shared = settings.pop("members", 1), settings.pop("shared_tokens", 0)
    if "from" in settings:
        settings["init"] = str(Path(os.environ["STUDY_PROMPTS"], settings.pop("from")))
    jobs, tests = [], []
    for domain in DOMAINS if run["domain"] == "all" else [run["domain"]]:
        rest, test = balanced(sentiment_rows(domain), 1000, seed=0)
        train, validation = balanced(rest, 200, seed=1)
        task = Task("classification", TEMPLATE, "label", words, max_length=128, model=SMOLLM2, prompt=domain)
        jobs.append(TuningJob(task, train, validation))
        tests.append(test)
    model, tokenizer = load_base_model(SMOLLM2, device="cpu")
    tuned = (spf.DeepPromptModel if deep else spf.SoftPromptModel)(model)
    with tempfile.TemporaryDirectory() as folder:
        if members != 1:
            task = jobs[0].task
            ensemble = tune_ensemble(
                tuned, tokenizer, task, jobs[0].train_rows, jobs[0].held_out_rows, folder, members=members, **settings
            )
            results = ensemble.members
            names = [result.folder.name for result in results]
            scores = [evaluate_ensemble(tuned, tokenizer, task, tests[0], names)]
            last = [evaluate(tuned, tokenizer, task, tests[0], prompt=name)["accuracy"] for name in names]
        else:
            results = tune_tasks(tuned, tokenizer, jobs, folder, shared_tokens=shared, **settings)
            scores = [
                evaluate(tuned, tokenizer, job.task, test, prompt=job.task.prompt)
                for job, test in zip(jobs, tests, strict=True)
            ]
            last = []
            if run["study"].startswith("default"):
                path = max(Path(folder, "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
                with torch.no_grad():
                    tuned.prompts[run["domain"]].copy_(tuned.read_prompt(path / run["domain"]))
                last = [evaluate(tuned, tokenizer, jobs[0].task, tests[0])["accuracy"]]
    return [
        {
            "study": run["study"],
            "model": SMOLLM2,
            "domain": job.task.prompt,
            "variant": run["variant"],
            "settings": json.dumps(run["settings"]),
            "seed": run["settings"]["seed"],
            "steps": result.steps,
            "best_step": result.best_step,
            "validation_accuracy": round(result.after["accuracy"], 4),
            "test_accuracy": round(score["accuracy"], 4),
            "test_low": round(score["accuracy_low"], 4),
            "test_high": round(score["accuracy_high"], 4),
            "test_loss": round(score["loss"], 4),
            "other_test_accuracy": json.dumps([round(value, 4) for value in last]),
            "trained_numbers": sum(
                tuned.prompts[name].numel() for name in tuned.prompts if name.startswith(job.task.prompt)
            ),
            "train_seconds": round(result.tuning_seconds - result.evaluation_seconds),
            "curve": json.dumps(
                [[int(h["step"]), round(h["accuracy"], 3), round(h["loss"], 4)] for h in result.history]
            ),
        }
        for job, result, score in zip(jobs, results, scores, strict=False)
    ]


if __name__ == "__main__":
    main()
