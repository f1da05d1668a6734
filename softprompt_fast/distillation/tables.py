"""The tables of a compression, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .result import Compression
from .retention import Retention


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first column holds what is in front of a query."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    prompts: int
    """The last rows are those of this many trained prompts."""


def retention_table(result: Compression) -> Table:
    """What each candidate retains."""
    everything = [*result.references, *(prompt.retention for prompt in result.prompts)]
    title = f"Retention on {result.held_out_queries} held-out queries"
    heads = ["in front of a query", "tokens", "same token", "KL per token", "same first token"]
    names: list[str] = []
    if result.free_queries:
        names = list(everything[0].scores)
        title += f"; free continuations of {result.free_queries}"
        heads += ["ROUGE-L", "same text", *names]
    rows = [[one.label, str(one.tokens), *_numbers(one, names, free=bool(result.free_queries))] for one in everything]
    return Table(title, heads, rows, len(result.prompts))


def _numbers(one: Retention, names: Sequence[str], *, free: bool) -> list[str]:
    values: list[float | None] = [one.agreement, one.kl, one.first_token]
    if free:
        values += [one.rouge_l, one.same_text, *(one.scores.get(name) for name in names)]
    return ["" if value is None else f"{value:.3f}" for value in values]


def cost_table(result: Compression) -> Table:
    """What a request costs with the whole text and with each prompt, and what training costs."""
    memory, tokens = _bytes(result.text_cache_bytes), str(result.text_tokens)
    rows = [
        ["whole text", tokens, "", _milliseconds(result.text_first_token_seconds), "", ""],
        ["whole text, kept", tokens, memory, _milliseconds(result.compiled_first_token_seconds), "", ""],
    ]
    for prompt in result.prompts:
        requests = prompt.break_even_requests
        rows.append(
            [
                prompt.retention.label,
                str(prompt.tokens),
                _bytes(prompt.cache_bytes),
                _milliseconds(prompt.first_token_seconds),
                f"{prompt.training_seconds:.0f} s",
                "never" if requests is None else f"{requests:,} requests",
            ]
        )
    heads = ("in front of a query", "tokens", "memory", "first token", "training", "paid for after")
    return Table("Cost of a request", heads, rows, len(result.prompts))


def recommendation(result: Compression) -> str:
    """The number of tokens that is recommended, and why."""
    best = max(prompt.retention.agreement for prompt in result.prompts)
    return (
        f"recommended: {result.recommended.tokens} tokens, the fewest with an agreement at most {result.max_drop:g} "
        f"below the best ({best:.3f})"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
