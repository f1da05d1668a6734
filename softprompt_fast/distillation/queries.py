"""Queries: given ones, and ones that the model makes itself from the text."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..analysis.duplicates import normalise
from ..base.files import write_atomically
from ..tasks.decoding import decode, read_bytes
from ..tasks.encoding import encode_text, token_ids
from ..tasks.examples import Examples
from ..tasks.rows import Origin, Rows, choose, place, places
from ..tasks.task import Task
from .source_text import SourceText, words_after, words_before
from .teacher import CHUNK, Teacher

logger = logging.getLogger("softprompt_fast")

SEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "question": (
        "Write one question that the text above answers.",
        ("What", "When", "Where", "Who", "Which", "How", "How many", "Why", "Is", "Can"),
    ),
    "summary": (
        "Write one request to summarise a part of the text above.",
        ("Summarise", "Explain", "Describe", "Give a short overview of"),
    ),
    "structure": (
        "Write one request to put facts of the text above into a list or a table.",
        ("List", "Make a list of", "Name", "Make a table of"),
    ),
    "use case": (
        "Write one message of somebody who needs the text above for a practical purpose.",
        ("I want to", "I have", "My", "Can I", "What should I do if"),
    ),
    "creative": (
        "Write one unusual, creative request about the text above.",
        ("Write a poem about", "Write a story about", "Invent", "Imagine"),
    ),
}
"""What the model is asked for, and the words with one of which its answer begins, because a small model would rather
answer than ask. Cartridges (arXiv 2506.06266) begins its conversations with these five kinds."""
PART = 256
"""Longer texts are shown in parts of about this many tokens, one for each query, so that all of it is asked about."""
QUERIES_FILE = "queries.jsonl"
"""The file of self-made queries, beside the prompts."""
EXAMPLE = "example"
"""Kind of a query that continues the text with the template's own words, as one more example of a few-shot block."""
LONGEST = 48
"""Tokens of a query that the model makes."""
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
"""How queries are drawn: a small model that draws from its whole distribution makes few that ask something."""
DRAWS = 6
"""Most queries that are drawn for each one that is asked for."""
SIMILAR = 0.8
"""Two queries are near-duplicates if so much of their words is common: the size of the intersection over the union."""
MARKER = re.compile(r"^[\s\"'“”*#>-]*(?:\d+[.)]\s*)?(?:[A-Z]?[a-z]+ ?(?:\d+)?:\s+)?[\"'“]?")
"""Quotes, the number of a list and a label such as "Question: " at the beginning of a line."""
QUESTION, SENTENCES = re.compile(r"[^?]*\?"), re.compile(r".*[.?!](?=\W|$)")
"""The first question, and all complete sentences, of a line."""


def read_text_lines(path: Path, column: str, encoding: str | None = None) -> Rows:
    """A query on each line of a text file; empty lines are left out."""
    text = decode(read_bytes(path, str(path)), str(path), encoding)
    lines = re.split(r"\r\n|\r|\n", text)  # `splitlines` also splits at characters inside of a line
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise ValueError(f"{path} must hold a query on each line, got none")
    return Rows([{column: line} for _, line in kept], [Origin(str(path), "line", number) for number, _ in kept])


def usable_queries(task: Task, rows: Examples, about: str | None = None) -> Examples:
    """Rows with text, each text once. Others are left out, with a warning that says where they are.

    Args:
        about: column of what a query is about: the same text about something else is another query.

    Raises:
        ValueError: no row is left, or no such column.
    """
    empty: list[int] = []
    repeated: list[int] = []
    kept: list[int] = []
    known: set[tuple[Any, str]] = set()
    for i, row in enumerate(rows):
        try:
            text = task.text(row)
        except ValueError as error:
            if str(error) != "the text is empty":
                raise
            empty.append(i)
            continue
        key = (None if about is None else row.get(about), text)
        (repeated if key in known else kept).append(i)
        known.add(key)
    reasons = [
        f"{reason} ({places(rows, which)})" for reason, which in (("no text", empty), ("repeated", repeated)) if which
    ]
    if not kept:
        raise ValueError(f"the queries must hold text, got none among {len(rows)}: {'; '.join(reasons) or 'no rows'}")
    if reasons:
        logger.warning("%d of %d queries are left out: %s", len(rows) - len(kept), len(rows), "; ".join(reasons))
    return choose(rows, kept)


def make_queries(
    teacher: Teacher,
    source: SourceText,
    task: Task,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Queries that the model makes itself after the text: rows of the template's column and the query's ``kind``.

    Near-duplicates are left out. After :data:`DRAWS` times as many drawn ones, fewer are returned, with a warning.

    Raises:
        ValueError: the model makes fewer than two queries.
    """
    (column,) = task.columns
    starts, shown_parts = query_starts(teacher.tokenizer, source)
    kinds, parts = list(starts), teacher.add_parts(shown_parts)
    rows: Examples = []
    known: list[set[str]] = []
    drawn = 0
    while len(rows) < count and drawn < DRAWS * count:
        draw = random.Random(f"{seed} {drawn}")
        asked = [(kind, *draw.choice(starts[kind])) for kind in (kinds[(drawn + i) % len(kinds)] for i in range(CHUNK))]
        shown = [draw.choice(parts) for _ in asked]
        answers = teacher.generate(
            [ids for *_, ids in asked],
            seed + drawn + 1,
            (teacher.model, shown),
            max_new_tokens=LONGEST,
            **SAMPLING,
        )
        drawn += len(asked)
        before = len(rows)
        for (kind, opening, _), answer in zip(asked, answers, strict=True):
            said = [*token_ids(teacher.tokenizer, opening), *answer] if opening else answer
            text = teacher.tokenizer.decode(said, skip_special_tokens=True)
            query = _one_query(text, words_after(source.template) if kind == EXAMPLE else "", kind)
            words = set(normalise(query).split())
            if len(rows) < count and query and _usable(task, {column: query}) and _is_new(words, known):
                known.append(words)
                rows.append({"kind": kind, column: query})
        if progress is not None:
            progress(len(rows) - before)
    if len(rows) < min(2, count):
        raise ValueError(
            f"the model made {len(rows)} different queries in {drawn} tries, too few to train on; give queries instead"
        )
    if len(rows) < count:
        logger.warning("the model made %d different queries in %d tries, not %d", len(rows), drawn, count)
    return rows


def check_one_column(task: Task) -> None:
    """Raises ValueError if the model cannot make queries, because the template has several columns."""
    if len(task.columns) != 1:
        raise ValueError(f"self-made queries need a template with one column, got {', '.join(task.columns)}")


def write_queries(rows: Examples, folder: Path) -> None:
    """Keeps self-made queries beside the prompts; nothing is written if there are none."""
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / QUERIES_FILE, lines)


def encoded(task: Task, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
    """Token ids [T] of each query, as serving reads it.

    Raises:
        ValueError: a query without tokens, with its row.
    """
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(encode_text(task, row, tokenizer))
        except ValueError as error:
            raise ValueError(f"{place(rows, i)}: {error}") from error
    return found


def query_starts(tokenizer: Any, source: SourceText) -> tuple[dict[str, list[tuple[str, list[int]]]], list[list[int]]]:
    """What the model is asked for, and after what.

    Returns:
        For each kind of query its openings, and the token ids after which the model continues them; and the parts of
        the text, token ids [T] of about :data:`PART` tokens each. A block of examples is one part.
    """
    example = words_before(source.template).rstrip(" ")
    if not source.is_chat and _has_examples(tokenizer, source, example):
        return {EXAMPLE: [("", token_ids(tokenizer, example))]}, [source.ids]
    with suppress(ValueError):  # the tokenizer has no chat template, or none with a system prompt
        source = source if source.is_chat else source.in_chat(tokenizer)
    starts = {
        kind: [(opening, source.asking(tokenizer, words, opening)) for opening in openings]
        for kind, (words, openings) in SEEDS.items()
    }
    frame, rest = source.ids[: source.frame], source.ids[source.frame :]
    count = -(-len(rest) // PART)
    bounds = [len(rest) * i // count for i in range(count + 1)]
    return starts, [frame + rest[start:end] for start, end in pairwise(bounds)]


def _has_examples(tokenizer: Any, source: SourceText, words: str) -> bool:
    """Whether a line of a text begins with a template's first words, as the tokenizer gives them back."""
    begins = str(tokenizer.decode(token_ids(tokenizer, words))).split() if words.strip() else []
    if not any(letter.isalnum() for word in begins for letter in word):
        return False
    pattern = r"^[ \t]*" + r"\s+".join(map(re.escape, begins)) + r"(?!(?<=\w)\w)"
    return re.search(pattern, tokenizer.decode(source.ids), re.MULTILINE) is not None


def _one_query(text: str, end: str, kind: str) -> str:
    """The first line of what the model said, up to the template's next words; no quotes, labels and half sentences."""
    if end.strip() and (at := text.find(end.strip())) >= 0:
        text = text[:at]
    line = next((line for line in text.splitlines() if line.strip()), "")
    if kind != EXAMPLE:
        line = MARKER.sub("", line, count=1)
        whole = QUESTION.match(line) if kind == "question" else SENTENCES.match(line)
        line = line if whole is None else whole.group()
    line = line.strip().strip("\"'“”*").strip()
    return "" if kind != EXAMPLE and line.endswith((":", ",")) else line


def _usable(task: Task, row: dict[str, Any]) -> bool:
    try:
        task.text(row).encode()
    except ValueError:  # no words, or half of a character that the last token has cut
        return False
    return True


def _is_new(words: set[str], known: Sequence[set[str]]) -> bool:
    return bool(words) and all(len(words & other) < SIMILAR * len(words | other) for other in known)
