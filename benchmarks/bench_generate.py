"""Text generation for rows of different prompts: one batch, the pipeline, and one row after the other.

Eight prompts of 1 to 100 tokens, one text each, 16 new tokens. Before anything is timed the three ways must give the
same tokens.

    python benchmarks/bench_generate.py --output benchmarks/results/generate.csv
"""

from __future__ import annotations

from typing import Any

import torch
from common import Row, add_model_arguments, argument_parser, environment, interleaved, load, write_rows

LENGTHS = (1, 5, 10, 20, 40, 60, 80, 100)
NEW = 16


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="float32", rounds=5)
    arguments = parser.parse_args()
    for row in measure(arguments.model, arguments.dtype, arguments.device, arguments.rounds, arguments.output):
        print(row)


def measure(name: str, dtype: str, device: str, rounds: int, output: Any) -> list[Row]:
    from softprompt_fast import SoftPromptModel
    from softprompt_fast.inference import PromptBank
    from softprompt_fast.inference.engine import Engine

    torch.manual_seed(0)
    model = load(name, dtype, device)
    tuned = SoftPromptModel(model)
    for length in LENGTHS:
        tuned.add_prompt(f"p{length}", length, init="vocabulary", seed=length)
    names = [f"p{length}" for length in LENGTHS]
    texts = torch.randint(100, min(10_000, model.config.vocab_size), (len(names), 24), device=device)
    mask = torch.ones_like(texts)
    for row in range(len(names)):
        mask[row, : 2 * row] = 0
    bank = PromptBank(tuned)
    engine = Engine(bank)
    ids = [text[real == 1].tolist() for text, real in zip(texts, mask, strict=True)]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def batch() -> torch.Tensor:
        return tuned.generate(texts, mask, names, **options)[:, texts.shape[1] :]

    def pipeline() -> torch.Tensor:
        with bank.use(names) as view:
            return engine.generate(view, ids, names, options)

    def one_by_one() -> torch.Tensor:
        alone = [
            tuned.generate(torch.tensor([i], device=device), None, [n], **options)
            for i, n in zip(ids, names, strict=True)
        ]
        return torch.cat([found[:, -NEW:] for found in alone])

    runs = {"batch": batch, "pipeline": pipeline, "one by one": one_by_one}
    expected = one_by_one()
    for way, run in runs.items():
        if not torch.equal(run(), expected):
            raise SystemExit(f"{way} gives other tokens than one row after the other")
    times = interleaved(runs, rounds, device=device)
    rows: list[Row] = [
        {"way": way, "seconds": round(seconds, 4), "to_pipeline": round(seconds / times["pipeline"], 3)}
        | {"model": name, "dtype": dtype}
        | environment(device)
        for way, seconds in times.items()
    ]
    if output is not None:
        write_rows(output, rows)
    return rows


if __name__ == "__main__":
    main()
