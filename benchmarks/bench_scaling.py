"""How the cost of a training step grows with longer prompts, more rows and more distinct prompts, for the same text.

Every step has the same text tokens, cut into B rows of equal length, each after a prompt of P virtual tokens; N of the
prompts are distinct. Shared-prompt execution should cost text + N * P, the padded layout text + B * P. Usage::

    python benchmarks/bench_scaling.py --model DIR --output benchmarks/results/scaling_cpu.csv
"""

from __future__ import annotations

import json

import torch
from common import Row, add_model_arguments, argument_parser, environment, interleaved, load, write_rows

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

    def step() -> None:
        tuned(ids, labels=labels, prompt_ids=uses).loss.backward()

    step()
    return interleaved({"step": step}, rounds)["step"]


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="bfloat16", rounds=3, device=False)
    parser.add_argument("--text", type=int, default=512, help="text tokens of a step")
    arguments = parser.parse_args()
    cases = [(rows, virtual, 1) for rows in ROWS for virtual in LENGTHS]
    cases += [(max(DISTINCT), 100, distinct) for distinct in DISTINCT[1:]]
    rows: list[Row] = []
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
            **environment(),
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
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
