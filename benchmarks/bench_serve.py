"""Answers requests for many tasks: one mixed batch on compiled prompts, compared with one PEFT adapter per task.

PEFT holds one prompt-tuning adapter per task and runs one batch per task after ``set_adapter``. Everything is measured
interleaved in one process; medians are compared. Usage::

    python benchmarks/bench_serve.py --model DIR [--output benchmarks/results/serve_cpu.csv]
    python benchmarks/bench_serve.py --model llama-1b --dtype bfloat16 --device cuda --tasks 64 --requests 64
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import add_model_arguments, append_rows, argument_parser, environment, interleaved, load, print_profile

from softprompt_fast.inference.engine import Engine
from softprompt_fast.inference.prompt_bank import PromptBank

NEW_TOKENS = 32
JOBS = ["classify", "generate"]
MOST_GENERATED = 64
"""Texts are not generated for more requests: minutes, and nothing new."""


def requests(count: int, vocabulary: int) -> list[list[int]]:
    """Token ids of 16 to 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 33, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def prompts(count: int, virtual: int, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts of random tokens' embeddings, like the initial values of tuned ones."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, len(table), (count, virtual), generator=generator)
    return {f"task{i}": table[row.to(table.device)].clone().float() for i, row in enumerate(ids)}


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Peft:
    """One adapter per task, one batch per task."""

    def __init__(self, model: Any, bank: dict[str, torch.Tensor]) -> None:
        import peft

        virtual = len(next(iter(bank.values())))
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual, inference_mode=True)
        names = list(bank)
        self.model: Any = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        with torch.no_grad():
            for name, values in bank.items():
                self.model.prompt_encoder[name].embedding.weight.copy_(values)
        self.model.eval()

    def _by_task(
        self, rows: list[list[int]], names: list[str], run: Callable[[Any], torch.Tensor]
    ) -> list[torch.Tensor]:
        results: list[Any] = [None] * len(rows)
        for name in dict.fromkeys(names):
            mine = [i for i, used in enumerate(names) if used == name]
            self.model.set_adapter(name)
            batch = {key: value.to(self.model.device) for key, value in left_padded([rows[i] for i in mine]).items()}
            for i, result in zip(mine, run(batch), strict=True):
                results[i] = result
        return results

    @torch.no_grad()
    def classify(self, rows: list[list[int]], names: list[str]) -> list[torch.Tensor]:
        return self._by_task(rows, names, lambda batch: self.model(**batch).logits[:, -1])

    @torch.no_grad()
    def generate(self, rows: list[list[int]], names: list[str]) -> list[torch.Tensor]:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return self._by_task(rows, names, lambda batch: self.model.generate(**batch, **options)[:, -NEW_TOKENS:])


class Ours:
    """Mixed batches on compiled prompts, by the engine of the pipeline."""

    def __init__(self, model: Any, bank: dict[str, torch.Tensor]) -> None:
        self.bank = PromptBank(model, budget=16 << 30)
        for name, values in bank.items():
            self.bank.add(name, values)
        self.engine = Engine(self.bank)

    def classify(self, rows: list[list[int]], names: list[str]) -> list[torch.Tensor]:
        last = torch.tensor([(row, len(ids) - 1) for row, ids in enumerate(rows)])
        with self.bank.use(names) as view:
            return list(self.engine.logits_at(view, rows, names, last))

    def generate(self, rows: list[list[int]], names: list[str]) -> list[torch.Tensor]:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        results: list[torch.Tensor] = []
        for at in range(0, len(rows), 64):
            with self.bank.use(names[at : at + 64]) as view:
                results += self.engine.generate(view, rows[at : at + 64], names[at : at + 64], options)
        return results


def agreeing(some: list[torch.Tensor], others: list[torch.Tensor]) -> int:
    """Rows with the same answer: the likeliest token, or all new tokens."""

    def answer(row: torch.Tensor) -> torch.Tensor:
        return row.argmax(-1) if row.is_floating_point() else row

    return sum(torch.equal(answer(x), answer(y)) for x, y in zip(some, others, strict=True))


def against_peft(arguments: argparse.Namespace) -> None:
    device = arguments.device
    for virtual in arguments.virtual_tokens:
        model = load(arguments.model, arguments.dtype, device)
        bank = prompts(arguments.tasks, virtual, model.get_input_embeddings().weight.detach())
        peft, ours = Peft(load(arguments.model, arguments.dtype, device), bank), Ours(model, bank)
        for count in arguments.requests:
            texts = requests(count, model.config.vocab_size)
            names = [f"task{i % arguments.tasks}" for i in range(count)]
            for job in arguments.jobs:
                if job == "generate" and count > MOST_GENERATED:
                    continue
                a, b = getattr(peft, job), getattr(ours, job)
                fewer = min(count, arguments.peft_requests or count)
                runs = {"peft": partial(a, texts[:fewer], names[:fewer]), "ours": partial(b, texts, names)}
                same = agreeing(runs["peft"](), runs["ours"]()[:fewer])
                rounds = max(1, arguments.rounds * 16 // count)
                times = interleaved(runs, rounds, device=device)
                if arguments.profile:
                    print_profile(f"{job}, ours", runs["ours"], device)
                row = {
                    **environment(device),
                    "dtype": arguments.dtype,
                    "job": job,
                    "tasks": arguments.tasks,
                    "P": virtual,
                    "requests": count,
                    "peft_s": round(times["peft"], 3),
                    "ours_s": round(times["ours"], 3),
                    "peft_requests": fewer,
                    "ratio": round(times["peft"] / fewer / (times["ours"] / count), 2),
                    "same_answers": f"{same}/{fewer}",
                }
                print(json.dumps(row), flush=True)
                if arguments.output:
                    append_rows(arguments.output, [row])  # at once: a run may be cut short


def resident(arguments: argparse.Namespace) -> None:
    """Prints what 1,024 resident prompts cost a mixed batch of 32, and a long prompt the first token of a text."""
    device = arguments.device
    model = load(arguments.model, arguments.dtype, device)
    table = model.get_input_embeddings().weight.detach()
    texts = requests(32, model.config.vocab_size)
    few, many = Ours(model, prompts(32, 20, table)), Ours(model, prompts(1024, 20, table))
    many.bank.compile()
    names = [f"task{i}" for i in range(32)]
    spread = [f"task{i * 32}" for i in range(32)]
    few.classify(texts, names), many.classify(texts, spread)
    times = interleaved(
        {"32": lambda: few.classify(texts, names), "1024": lambda: many.classify(texts, spread)},
        4 * arguments.rounds,
        device=device,
    )
    per_prompt = many.bank.stats()["compiled_bytes"] / 1024
    print(
        f"batch of 32, 1,024 resident prompts over 32: {times['1024'] / times['32']:.3f}; "
        f"{per_prompt / 1e6:.2f} MB per compiled prompt of 20 virtual tokens, {many.bank.bytes_per_token} bytes each"
    )
    long = Ours(model, prompts(1, 100, table))
    one = [texts[0]]
    times = interleaved(
        {"prompt": lambda: long.classify(one, ["task0"]), "none": lambda: long.classify(one, [None])},  # type: ignore[list-item]
        20 * arguments.rounds,
        device=device,
    )
    print(f"first token with a compiled prompt of 100 over none: {times['prompt'] / times['none']:.3f}")


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="float32", rounds=5)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, after the measurement")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--virtual-tokens", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--peft-requests", type=int, help="run only the first ones by PEFT; ratios are per request")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--skip-resident", action="store_true", help="leave out the cost of 1,024 resident prompts")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.unlink(missing_ok=True)
    if not arguments.skip_resident:
        resident(arguments)
    against_peft(arguments)


if __name__ == "__main__":
    main()
