"""Time until the first token of one request after a long text: whole, with its keys and values kept, and compressed.

A ``PromptBank`` serves all of them: the text's vectors run with every request or once (compiled), and a compressed text
is a compiled prompt of 16 virtual tokens or of 64 trained keys and values. Measured in turns; medians. Usage::

    python benchmarks/bench_first_token.py [--texts 450 2000] [--output benchmarks/results/first_token_cpu.csv]
"""

from __future__ import annotations

import json

import torch
from common import Row, add_model_arguments, append_rows, argument_parser, environment, interleaved, load

from softprompt_fast.distillation.cost import NAME
from softprompt_fast.inference.engine import Engine
from softprompt_fast.inference.prompt_bank import PromptBank

QUERY = 32
"""Tokens of the request."""
COMPRESSED = (16, 64)


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="float32", rounds=15)
    parser.add_argument("--texts", type=int, nargs="+", default=[450, 2000, 8000], help="tokens of the text")
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.dtype, arguments.device)
    table = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> torch.Tensor:
        return torch.randint(3, len(table), (count,), generator=generator)

    query = some(QUERY).tolist()
    for length in arguments.texts:
        text = table[some(length).to(table.device)].float()
        engines = {"text": Engine(bank_of(model, text, budget=0)), "kept_text": Engine(bank_of(model, text))}
        engines |= {f"prompt_{count}": Engine(bank_of(model, text[:count])) for count in COMPRESSED}

        def answer(engine: Engine) -> int:
            with engine.bank.use([NAME]) as view:
                logits = engine.logits_at(view, [query], [NAME], torch.tensor([[0, QUERY - 1]]))
            return int(logits.argmax())

        runs = {name: lambda engine=engine: answer(engine) for name, engine in engines.items()}  # type: ignore[misc]
        for run in runs.values():
            run(), run()
        times = interleaved(runs, arguments.rounds, device=arguments.device)
        row: Row = {
            **environment(arguments.device),
            "model": arguments.model,
            "dtype": arguments.dtype,
            "text_tokens": length,
            "query_tokens": QUERY,
            **{f"{name}_ms": round(1000 * seconds, 2) for name, seconds in times.items()},
            "text_over_prompt_16": round(times["text"] / times["prompt_16"], 2),
            "kept_text_over_prompt_16": round(times["kept_text"] / times["prompt_16"], 2),
        }
        print(json.dumps(row), flush=True)
        if arguments.output:
            append_rows(arguments.output, [row])


def bank_of(model: object, vectors: torch.Tensor, budget: int = 16 << 30) -> PromptBank:
    bank = PromptBank(model, budget=budget)
    bank.add(NAME, vectors)
    return bank


if __name__ == "__main__":
    main()
