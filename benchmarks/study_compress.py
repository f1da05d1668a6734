"""Compression of an instruction with fifteen examples, or of documents: one CSV row for each prompt.

    python benchmarks/study_compress.py --csv benchmarks/results/compress_cpu.csv --queries 192 768 --steps 200
    python benchmarks/study_compress.py --csv compress.csv --text documents --forms kv --queries 700

``instruction`` is the text below, about 450 tokens with SmolLM2's tokenizer. ``reviews`` is the same instruction with
ten labelled movie reviews as its examples, also about 450 tokens. The queries of both are other movie reviews, cut to
160 characters, without their labels. ``documents`` are the four of ``texts`` one after the other, about 2,000 tokens,
and their queries 3,600 questions about them. ``--self-made`` queries are made by the model from the text, with seed 0;
a run takes its ``--queries`` from these first, then from the given ones. The same 64 given queries are held out in all
runs. The teacher answers once; every run reads its cache. `seconds` are those of the training, with whatever else the
machine did at the time.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import add_base_arguments, append_rows, argument_parser, environment
from study_documents import DOCUMENTS, TEXTS, queries, shuffled_questions
from study_documents import TEMPLATE as QUESTION

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
REVIEW_EXAMPLES = 10
"""Labelled reviews in the text ``reviews``."""
NEW_TOKENS = {"instruction": 12, "reviews": 12, "documents": 24}
"""Longest answer of the teacher."""
INTEGERS = ("batch_size", "free_continuations", "new_tokens", "top_k", "seed", "steps")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--text", choices=list(NEW_TOKENS), default="instruction")
    add_base_arguments(parser)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--steps", nargs="*", type=int, default=[200])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--queries", nargs="*", type=int, default=[768], help="queries to train on")
    parser.add_argument("--self-made", type=int, default=0, help="queries that the model makes")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as batch_size=32")
    arguments = parser.parse_args()

    from softprompt_fast.hf import load_base_model

    model, tokenizer = load_base_model(arguments.model, arguments.dtype, arguments.device)
    given, held_out = given_queries(arguments.text, arguments.held_out)
    made = self_made(model, tokenizer, arguments) if arguments.self_made else []
    references = True
    for seed in arguments.seeds:
        for form in arguments.forms:
            for count in arguments.queries:
                for steps in arguments.steps:
                    train = [made[:count], given[: max(0, count - len(made))]]
                    rows = run(model, tokenizer, form, train, held_out, steps, seed, arguments)
                    append_rows(arguments.csv, rows if references else rows[-1:])
                    references = False


def text_of(name: str) -> dict[str, Any]:
    """The arguments of ``compress`` that are the same for all runs with a text."""
    if name == "instruction":
        return {"text": TEXT, "template": TEMPLATE}
    if name == "reviews":
        return {"text": INSTRUCTION + "".join(map(example, range(REVIEW_EXAMPLES))), "template": TEMPLATE}
    documents = [(TEXTS / f"{document}.txt").read_text().strip() for document in DOCUMENTS]
    return {"text": "".join(f"{text}\n\n" for text in documents), "template": QUESTION}


@cache
def reviews() -> list[dict[str, Any]]:
    from softprompt_fast.demo import sentiment_rows

    rows = sentiment_rows("movies")
    random.Random(0).shuffle(rows)
    return rows


def example(place: int) -> str:
    """A labelled review of the text ``reviews``. Its aspect depends on its place alone."""
    row = reviews()[place]
    strength = {"negative": "weak", "positive": "strong"}[row["label"]]
    aspect = ("acting", "story")[place % 2]
    return f"Review: {row['text']}\nSentiment: {row['label']} - {strength} {aspect}\n\n"


def given_queries(
    name: str, held_out: int, shown: int = REVIEW_EXAMPLES
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Queries to train on, and those that are held out, the same ones for each seed.

    Args:
        shown: examples of ``reviews`` that are no queries.
    """
    if name == "documents":
        train, kept = queries(held_out)
        return train + shuffled_questions("more_questions.jsonl"), kept
    from softprompt_fast.demo import sentiment_rows

    texts = list(dict.fromkeys(row["text"][:160] for row in sentiment_rows("movies")))
    if name == "reviews":
        examples = {row["text"][:160] for row in reviews()[:shown]}
        texts = [text for text in texts if text not in examples]
    random.Random(0).shuffle(texts)
    rows = [{"text": text} for text in texts]
    return rows[held_out:], rows[:held_out]


def settings_of(arguments: Any, **changes: Any) -> Any:
    from softprompt_fast.distillation import DistillationSettings

    # The CSV has no column of free continuations.
    given: dict[str, Any] = {"new_tokens": NEW_TOKENS[arguments.text], "free_continuations": 0}
    for pair in arguments.set:
        name, _, value = pair.partition("=")
        given[name] = int(value) if name in INTEGERS else float(value) if name == "learning_rate" else value
    return DistillationSettings(**given | changes)


def self_made(model: Any, tokenizer: Any, arguments: Any) -> list[dict[str, Any]]:
    """Queries that the model makes from the text, as ``compress`` makes them."""
    from softprompt_fast.distillation.preparation import task_of
    from softprompt_fast.distillation.queries import make_queries
    from softprompt_fast.distillation.source_text import read_source
    from softprompt_fast.distillation.teacher import Teacher

    settings, about = settings_of(arguments), text_of(arguments.text)
    source = read_source(tokenizer, about["text"], about["template"], chat=False)
    teacher = Teacher(model, tokenizer, source.ids, settings, None)
    task = task_of(model, source.template, settings, None)
    return [{"text": row["text"]} for row in make_queries(teacher, source, task, arguments.self_made)]


def run(
    model: Any,
    tokenizer: Any,
    form: str,
    queries: Sequence[list[dict[str, Any]]],
    held_out: list[dict[str, Any]],
    steps: int,
    seed: int,
    arguments: Any,
) -> list[dict[str, Any]]:
    """The rows of one compression: what it is compared with, and the prompt.

    Args:
        queries: those that the model made, and given ones.
    """
    from softprompt_fast.distillation import compress

    settings = settings_of(arguments, form=form, steps=steps, seed=seed)
    about = text_of(arguments.text)
    with tempfile.TemporaryDirectory() as folder:
        result = compress(
            model,
            tokenizer,
            about.pop("text"),
            folder,
            [row for some in queries for row in some],
            tokens=FORMS[form],
            held_out=held_out,
            settings=settings,
            **about,
        )
    common = {
        "text": arguments.text,
        "dtype": arguments.dtype,
        "form": form,
        "text_tokens": result.text_tokens,
        "queries": len(queries[1]),
        "self_made": len(queries[0]),
        "held_out": result.held_out_queries,
        "steps": steps,
        "batch": settings.batch_size,
        "rate": result.prompts[0].learning_rate,
        "changes": " ".join(arguments.set),
        "seed": seed,
    }
    return measured(result, common, arguments.device)


def measured(result: Any, common: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    (prompt,) = result.prompts
    contestants: Sequence[Any] = (*result.references, prompt.retention)
    rows = []
    for one in contestants:
        own = one is prompt.retention
        rows.append(
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
                "teacher_seconds": round(result.teacher_seconds) if own else "",
                "text_ms": round(1000 * result.text_first_token_seconds, 1) if own else "",
                "kept_text_ms": round(1000 * result.compiled_first_token_seconds, 1) if own else "",
                "prompt_ms": round(1000 * prompt.first_token_seconds, 1) if own else "",
                **environment(device),
            }
        )
    return rows


if __name__ == "__main__":
    main()
