"""The report of a compression as one HTML page, which needs no other file and no network."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from os import PathLike
from pathlib import Path

from ..base.figures import inline_svg
from ..base.files import write_atomically
from ..base.page import Cell, bullets, document, figure, table
from ..prompts.card_facts import without_folders
from .figure import retention_figure
from .result import Compression
from .tables import Table, cost_table, recommendation, retention_table

MEANINGS = {
    "same token": "share of the places in the teacher's continuations where the most probable token is the teacher's",
    "KL per token": "divergence from the teacher over the whole vocabulary, in nats",
    "same first token": "share of the queries whose answer begins with the teacher's most probable token",
    "ROUGE-L": "mean F1 (Lin 2004) of the words of both texts, where student and teacher continue a query freely",
    "same text": "share of the queries after which both texts are exactly the same",
    "memory": "keys and values that serving holds",
    "first token": "time until the first token of one request",
    "paid for after": "requests until the time saved is the time that the teacher and the training took",
}


def write_page(result: Compression, path: PathLike[str] | str) -> Path:
    """Writes the page of a compression.

    Args:
        path: of the HTML file; its folder is made if needed.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    write_atomically(path, html_page(result))
    return path


def html_page(result: Compression) -> str:
    """The text of the page: what is retained, what it costs, figures, notes and settings."""
    title = f"A text of {result.text_tokens} tokens, compressed"
    prompts = [prompt.retention for prompt in result.prompts]
    sentence = recommendation(result) if len(prompts) > 1 else f"{result.recommended.tokens} tokens"
    kept = result.recommended.retention
    summary = f"{sentence}: the same token as with the whole text at {kept.agreement:.1%} of the places"
    kind = "few" if result.retains_nothing else "fine"
    caption = "Agreement and divergence against the number of tokens"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{result.training_queries} queries for training, {result.held_out_queries} held out</p>',
        f'<div class="status {kind}">{escape(summary[0].upper() + summary[1:])}</div>',
        bullets(result.notes),
        *_section(retention_table(result)),
        f'<div class="figures wide">{figure(inline_svg(retention_figure(result), caption), caption)}</div>',
        *_section(cost_table(result)),
        "<h2>Prompts</h2>",
        _prompts(result),
        "<h2>Settings</h2>",
        _settings(result),
    ]
    return document(title, parts)


def _section(rows: Table) -> list[str]:
    strong = frozenset(range(len(rows.rows) - rows.prompts, len(rows.rows)))
    meanings = [f"{head}: {MEANINGS[head]}" for head in rows.heads if head in MEANINGS]
    return [f"<h2>{escape(rows.title)}</h2>", table(rows.heads, rows.rows, strong=strong), bullets(meanings)]


def _prompts(result: Compression) -> str:
    rows: list[list[str | Cell]] = [
        [
            one.retention.label,
            Cell(one.folder.name, ""),
            Cell(without_folders(one.init), ""),
            Cell(", ".join(f"{kind} {loss:.3f}" for kind, loss in one.init_losses.items()), ""),
            f"{one.loss:.3f}",
            f"{one.file_bytes:,} bytes",
        ]
        for one in result.prompts
    ]
    heads = ("prompt", "folder", "initial values", "their losses", "training loss", "on disk")
    return table(heads, rows)


def _settings(result: Compression) -> str:
    rates = ", ".join(str(rate) for rate in dict.fromkeys(prompt.learning_rate for prompt in result.prompts))
    values = asdict(result.settings) | {"learning_rate": rates, "max_drop": result.max_drop}
    rows: list[list[str | Cell]] = [[name, Cell(without_folders(str(value)), "")] for name, value in values.items()]
    rows += [
        ["teacher", Cell(f"{result.teacher_seconds:.1f} s", "")],
        ["training", Cell(f"{sum(prompt.training_seconds for prompt in result.prompts):.1f} s", "")],
    ]
    return table(("setting", "value"), rows)
