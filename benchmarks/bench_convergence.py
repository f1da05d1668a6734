"""Tuning time until a held-out accuracy: our defaults, PEFT's defaults, PEFT with our initial values and rate.

    python benchmarks/bench_convergence.py --csv benchmarks/results/convergence_cpu.csv

Movie reviews, SmolLM2-135M, 20 virtual tokens, 32 rows per step, the same rows for all. All three train in
transformers' Trainer, one after the other, each in a separate process. The same code scores all of them; its time does
not count. PEFT's defaults: random initial values, the learning rate of its guide to prompt methods (3e-2, linear), the
loss over the whole vocabulary, which PEFT's forward computes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import append_rows, argument_parser, last_line
from transformers import Trainer, TrainerCallback, TrainingArguments

import softprompt_fast as spf
from softprompt_fast.demo import LABEL_WORDS, TEMPLATE, balanced, sentiment_rows
from softprompt_fast.evaluation import evaluate
from softprompt_fast.hf import SMOLLM2, load_base_model
from softprompt_fast.tasks import Task
from softprompt_fast.tasks.collation import Collator, pad_token_id
from softprompt_fast.tasks.encoding import encode
from softprompt_fast.tuning import TuningSettings, tune
from softprompt_fast.tuning.prompt_setup import add_prompt

METHODS = ("ours", "peft with our start and rate", "peft")
ROWS = 600
MOST_STEPS = 120


class StopAt(TrainerCallback):
    """Ends a run at an accuracy."""

    def __init__(self, target: float) -> None:
        self.target = target

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs["metrics"]["eval_accuracy"] >= self.target:
            control.should_training_stop = True


class Scored(TrainerCallback):
    """Scores PEFT's prompt every few steps and records how long that takes."""

    def __init__(self, peft_model: Any, scorer: Any, every: int, target: float) -> None:
        self.peft_model, self.scorer, self.every, self.target = peft_model, scorer, every, target
        self.history: list[dict[str, float]] = []
        self.evaluation_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        now = time.perf_counter()
        seconds = now - self.start - self.evaluation_seconds
        accuracy = self.scorer(self.peft_model.prompt_encoder["default"].embedding.weight.detach())
        self.evaluation_seconds += time.perf_counter() - now
        self.history.append({"step": state.global_step, "seconds": seconds, "accuracy": accuracy})
        print(self.history[-1], file=sys.stderr, flush=True)
        if accuracy >= self.target:
            control.should_training_stop = True


def run(method: str, seed: int, target: float, every: int) -> dict[str, Any]:
    rest, held_out = balanced(sentiment_rows("movies"), ROWS, seed=0)
    model, tokenizer = load_base_model(SMOLLM2, device="cpu")
    task = Task("classification", TEMPLATE, "label", LABEL_WORDS, max_length=128, model=SMOLLM2, prompt="movies")
    with tempfile.TemporaryDirectory() as folder:
        if method == "ours":
            tuned = spf.SoftPromptModel(model)
            stop = [StopAt(target)]
            result = tune(tuned, tokenizer, task, rest, held_out, folder, eval_every=every, seed=seed, callbacks=stop)
            history = result.history
        else:
            history = run_peft(method, model, tokenizer, task, rest, held_out, folder, seed, target, every)
    reached = next((point for point in history if point["accuracy"] >= target), None)
    return {
        "method": method,
        "seed": seed,
        "target": target,
        "reached": reached is not None,
        "step": (reached or history[-1])["step"],
        "seconds": round((reached or history[-1])["seconds"], 1),
        "accuracy": round((reached or history[-1])["accuracy"], 4),
        "seconds_per_step": round(history[-1]["seconds"] / history[-1]["step"], 3),
        "rows": ROWS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": json.dumps([[p["step"], round(p["seconds"], 1), round(p["accuracy"], 4)] for p in history]),
    }


def run_peft(
    method: str,
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    folder: str,
    seed: int,
    target: float,
    every: int,
) -> list[dict[str, float]]:
    import peft
    from transformers import set_seed

    ours = method != "peft"
    # The weights are de-quantised when loaded; Trainer reads this flag and would refuse.
    model.is_quantized, model.hf_quantizer = False, None
    scored = spf.SoftPromptModel(load_base_model(SMOLLM2, device="cpu")[0])
    settings = TuningSettings(seed=seed)
    add_prompt(scored, tokenizer, task, settings)

    def score(values: torch.Tensor) -> float:
        with torch.no_grad():
            scored.prompts[task.prompt].copy_(values)
        return evaluate(scored, tokenizer, task, held_out)["accuracy"]

    set_seed(seed)
    tuned: Any = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
    if ours:
        with torch.no_grad():
            tuned.prompt_encoder["default"].embedding.weight.copy_(scored.prompts.snapshot(task.prompt))
    collate = Collator(pad_token_id(tokenizer))

    def collated(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(features)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    callback = Scored(tuned, score, every, target)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=MOST_STEPS,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate if ours else 3e-2,
        lr_scheduler_type=settings.schedule if ours else "linear",
        warmup_steps=MOST_STEPS // 20 if ours else 0,
        weight_decay=0.0,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    features = encode(task, rows, tokenizer)
    trainer = Trainer(tuned, arguments, data_collator=collated, train_dataset=features, callbacks=[callback])
    trainer.train()
    return callback.history


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one[0], int(arguments.one[1]), arguments.target, arguments.every)))
        return
    for seed in arguments.seeds:
        for method in arguments.methods:
            options = ["--csv", os.devnull, "--one", method, str(seed)]
            options += ["--target", str(arguments.target), "--every", str(arguments.every)]
            row = json.loads(last_line(__file__, *options))
            print({key: row[key] for key in ("method", "seed", "reached", "step", "seconds", "accuracy")}, flush=True)
            append_rows(arguments.csv, [row])


if __name__ == "__main__":
    main()
