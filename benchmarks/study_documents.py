"""Four documents as four prompts: what two of them in one request retain, trained apart and beside each other.

    python benchmarks/study_documents.py --csv benchmarks/results/documents_cpu.csv --beside 0 1 --steps 200

The documents of ``texts`` have about 500 tokens each, with SmolLM2's tokenizer. The queries are the 600 questions about
them, of which the same 64 are held out in all runs. "together" is against the teacher that reads both documents.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import add_base_arguments, append_rows, argument_parser, environment

TEXTS = Path(__file__).parent / "texts"
DOCUMENTS = ("fair", "kettle", "library", "trail")
TEMPLATE = "Question: {text}\nAnswer:"


def queries(held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions to train on, and those that are held out, as many of each document."""
    questions = shuffled_questions("questions.jsonl")
    kept: list[dict[str, Any]] = []
    for name in DOCUMENTS:
        kept += [row for row in questions if row["document"] == name][: held_out // len(DOCUMENTS)]
    texts = {row["text"] for row in kept}
    return [row for row in questions if row["text"] not in texts], kept


def shuffled_questions(file: str) -> list[dict[str, Any]]:
    questions = [json.loads(line) for line in (TEXTS / file).read_text().splitlines()]
    random.Random(0).shuffle(questions)
    return questions


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    add_base_arguments(parser)
    parser.add_argument("--form", default="kv")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--beside", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--queries", type=int, help="train on the first ones only")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--held-out", type=int, default=64)
    arguments = parser.parse_args()

    from softprompt_fast.hf import load_base_model

    model, tokenizer = load_base_model(arguments.model, arguments.dtype, arguments.device)
    for seed in arguments.seeds:
        for beside in arguments.beside:
            append_rows(arguments.csv, list(run(model, tokenizer, beside, seed, arguments)))


def run(model: Any, tokenizer: Any, beside: int, seed: int, arguments: Any) -> Iterable[dict[str, Any]]:
    from softprompt_fast.distillation import compress_documents

    train, held_out = queries(arguments.held_out)
    documents = {name: (TEXTS / f"{name}.txt").read_text() for name in DOCUMENTS}
    with tempfile.TemporaryDirectory() as folder:
        result = compress_documents(
            model,
            tokenizer,
            documents,
            folder,
            train[: arguments.queries],
            tokens=arguments.tokens,
            beside=beside,
            template=TEMPLATE,
            held_out=held_out,
            form=arguments.form,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            new_tokens=arguments.new_tokens,
            seed=seed,
        )
    for place, retention in (("alone", result.alone), ("together", result.together)):
        for one in retention:
            yield {
                "dtype": arguments.dtype,
                "form": arguments.form,
                "beside_in_training": beside,
                "steps": arguments.steps,
                "rate": result.learning_rate,
                "queries": result.training_queries,
                "held_out": result.held_out_queries,
                "seed": seed,
                "measured": place,
                "in_front": one.label,
                "tokens": one.tokens,
                "kl": round(one.kl, 4),
                "agreement": round(one.agreement, 4),
                "first_token": round(one.first_token, 4),
                "init": result.init,
                "training_loss": round(result.loss, 4),
                "seconds": round(result.training_seconds),
                "teacher_seconds": round(result.teacher_seconds),
                **environment(arguments.device),
            }


if __name__ == "__main__":
    main()
