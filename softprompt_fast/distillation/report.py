"""The tables of a compression on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .result import Compression
from .retention import Retention


def print_result(result: Compression, console: Console) -> None:
    """What is retained and what it costs, then the recommendation."""
    console.print(_retention_table(result))
    console.print(_cost_table(result))
    one = result.recommended
    if len(result.prompts) > 1:
        console.print(
            f"recommended: {one.tokens} tokens, the fewest with an agreement at most {result.max_drop:g} below the "
            f"best ({max(prompt.retention.agreement for prompt in result.prompts):.3f})",
            highlight=False,
        )
    for note in result.notes:
        console.print(note, highlight=False)


def _retention_table(result: Compression) -> Table:
    table = Table(title=f"Retention on {result.held_out_queries} held-out queries", title_justify="left")
    table.add_column("in front of a query")
    for heading in ("tokens", "same token", "KL per token", "same first token"):
        table.add_column(heading, justify="right")

    def add(one: Retention, style: str | None = None) -> None:
        numbers = (str(one.tokens), f"{one.agreement:.3f}", f"{one.kl:.3f}", f"{one.first_token:.3f}")
        table.add_row(one.label, *numbers, style=style)

    for reference in result.references:
        add(reference)
    for prompt in result.prompts:
        add(prompt.retention, "bold")
    return table


def _cost_table(result: Compression) -> Table:
    table = Table(title="Cost of a request", title_justify="left")
    table.add_column("in front of a query")
    for heading in ("tokens", "memory", "first token", "training", "paid for after"):
        table.add_column(heading, justify="right")
    memory, tokens = _bytes(result.text_cache_bytes), str(result.text_tokens)
    table.add_row("whole text", tokens, "", _milliseconds(result.text_first_token_seconds), "", "")
    table.add_row("whole text, kept", tokens, memory, _milliseconds(result.compiled_first_token_seconds), "", "")
    for prompt in result.prompts:
        requests = prompt.break_even_requests
        table.add_row(
            prompt.retention.label,
            str(prompt.tokens),
            _bytes(prompt.cache_bytes),
            _milliseconds(prompt.first_token_seconds),
            f"{prompt.training_seconds:.0f} s",
            "never" if requests is None else f"{requests:,} requests",
            style="bold",
        )
    return table


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
