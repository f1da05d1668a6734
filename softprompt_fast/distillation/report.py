"""The tables of a compression on the terminal."""

from __future__ import annotations

from rich import table
from rich.console import Console
from rich.text import Text

from .result import Compression
from .tables import Table, cost_table, recommendation, retention_table


def print_result(result: Compression, console: Console) -> None:
    """What is retained and what it costs, then the recommendation."""
    console.print(_drawn(retention_table(result)))
    console.print(_drawn(cost_table(result)))
    if len(result.prompts) > 1:
        console.print(recommendation(result), highlight=False, markup=False)
    for note in result.notes:
        console.print(note, highlight=False, markup=False)


def _drawn(rows: Table) -> table.Table:
    shown = table.Table(title=rows.title, title_justify="left")
    for place, head in enumerate(rows.heads):
        shown.add_column(Text(head), justify="right" if place else "left")
    for place, row in enumerate(rows.rows):
        trained = place >= len(rows.rows) - rows.prompts
        shown.add_row(*map(Text, row), style="bold" if trained else None)
    return shown
