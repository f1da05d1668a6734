"""A text that was edited: training from the prompt of the text before, and from nothing, one CSV row each.

    python benchmarks/study_warm_start.py --csv benchmarks/results/warm_start_cpu.csv

The text is the instruction with ten labelled reviews of ``study_compress.py``. In the edited one, the last three
reviews are others. The prompt of the first text is trained for ``--before`` steps. That of the edited text is then
trained for each of ``--warm`` steps from it, and for each of ``--steps`` from values made from the text. The same
queries are held out in all runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import add_base_arguments, append_rows, argument_parser, environment
from study_compress import INSTRUCTION, NEW_TOKENS, REVIEW_EXAMPLES, TEMPLATE, example, given_queries

EDITED = 3
"""Examples that the edited text has instead of others."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    add_base_arguments(parser)
    parser.add_argument("--form", default="embeddings")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--queries", type=int, default=384)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--before", type=int, default=100, help="steps of the first text's prompt")
    parser.add_argument("--warm", nargs="*", type=int, default=[12, 25, 50])
    parser.add_argument("--steps", nargs="*", type=int, default=[25, 50, 100])
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from softprompt_fast.distillation import DistillationSettings, compress
    from softprompt_fast.hf import load_base_model

    model, tokenizer = load_base_model(arguments.model, arguments.dtype, arguments.device)
    # The new examples of the edited text are no queries.
    train, held_out = given_queries("reviews", arguments.held_out, shown=REVIEW_EXAMPLES + EDITED)
    first = text_with(range(REVIEW_EXAMPLES))
    edited = text_with([*range(REVIEW_EXAMPLES - EDITED), *range(REVIEW_EXAMPLES, REVIEW_EXAMPLES + EDITED)])
    settings = DistillationSettings(
        form=arguments.form,
        new_tokens=NEW_TOKENS["reviews"],
        free_continuations=0,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    about: dict[str, Any] = {
        "tokens": arguments.tokens,
        "template": TEMPLATE,
        "held_out": held_out,
        "settings": settings,
    }
    queries = train[: arguments.queries]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compress(model, tokenizer, first, folder / "before", queries, steps=arguments.before, **about)
        runs = [("old prompt", steps) for steps in arguments.warm] + [("new", steps) for steps in arguments.steps]
        for start, steps in runs:
            init = {"init": folder / "before" / "prompt"} if start == "old prompt" else {}
            output = folder / f"{start} {steps}".replace(" ", "-")
            result = compress(model, tokenizer, edited, output, queries, steps=steps, **init, **about)
            (prompt,) = result.prompts
            row = {
                "dtype": arguments.dtype,
                "form": arguments.form,
                "tokens": arguments.tokens,
                "queries": len(queries),
                "top_k": arguments.top_k,
                "steps_before": arguments.before,
                "seed": arguments.seed,
                "start": start,
                "steps": steps,
                "kl": round(prompt.retention.kl, 4),
                "agreement": round(prompt.retention.agreement, 4),
                "first_token": round(prompt.retention.first_token, 4),
                "training_loss": round(prompt.loss, 4),
                "seconds": round(prompt.training_seconds),
            }
            append_rows(arguments.csv, [row | environment(arguments.device)])


def text_with(places: Any) -> str:
    return INSTRUCTION + "".join(map(example, places))


if __name__ == "__main__":
    main()
