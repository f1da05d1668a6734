"""HTML pages that need no other file and no network: their style, their frame, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #d9d9de; --soft: #f5f5f7; --text: #1d1d1f; --quiet: #5f6368; --page: #fff;
  --fine: #e9f6ee; --drift: #fdecee; --few: #fff6e0; --alarm: #b3263a; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3f3f45; --soft: #26262a; --text: #ececf0; --quiet: #a3a3ab; --page: #17171a;
    --fine: #15301f; --drift: #3a1a20; --few: #35290b; --alarm: #ff8f9d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
p.quiet, li { color: var(--quiet); } ul { padding-left: 20px; margin: 8px 0; }
.status { border-radius: 8px; padding: 12px 16px; margin: 16px 0; font-weight: 600; border-left: 6px solid; }
.fine { background: var(--fine); border-color: #228833; }
.drift { background: var(--drift); border-color: #d1495b; }
.few { background: var(--few); border-color: #c99700; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--soft); font-weight: 600; }
td { overflow-wrap: anywhere; } tr.strong td { font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.alarm { color: var(--alarm); font-weight: 600; } .skipped { color: var(--quiet); }
.figures { display: grid; gap: 16px; margin-top: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.figures.wide { grid-template-columns: 1fr; }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; }
figure.alarmed { border-color: #d1495b; }
figcaption { font-weight: 600; margin-bottom: 4px; } figcaption span { color: var(--quiet); font-weight: 400; }
svg { display: block; width: 100%; height: auto; } svg text { fill: currentColor; }
@media (max-width: 640px) {
  body { padding: 16px 14px 40px; }
  thead { display: none; } table, tbody, tr, td { display: block; width: 100%; }
  tr { border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px; padding: 6px 0; }
  td { border: 0; padding: 3px 12px; display: flex; justify-content: space-between; gap: 16px; text-align: right; }
  td::before { content: attr(data-label); color: var(--quiet); text-align: left; flex: none; }
  td.number { white-space: normal; }
  td.name { font-weight: 600; text-align: left; } td.name::before, td:empty::before { content: none; }
  td:empty { display: none; }
}
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table, without escaping."""

    text: str
    kind: str = "number"
    """Its class in :data:`STYLE`."""


def document(title: str, body: Iterable[str]) -> str:
    """A page.

    Args:
        title: without escaping.
        body: pieces of HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]], *, strong: frozenset[int] = frozenset()) -> str:
    """A table; on narrow screens each row becomes a box.

    Args:
        heads, rows: texts without escaping. The first column holds names, the others numbers or :class:`Cell`.
        strong: places of rows in bold.
    """
    lines = []
    for place, (name, *others) in enumerate(rows):
        cells = [Cell(name, "name") if isinstance(name, str) else name]
        cells += [Cell(one) if isinstance(one, str) else one for one in others]
        drawn = "".join(_cell(cell, head) for cell, head in zip(cells, heads, strict=True))
        lines.append(f"<tr{' class=strong' if place in strong else ''}>{drawn}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def bullets(lines: Iterable[str]) -> str:
    """A list of texts without escaping."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def figure(svg: str, caption: str, detail: str = "", *, alarmed: bool = False) -> str:
    """A figure with its caption.

    Args:
        svg: as :func:`~softprompt_fast.base.figures.inline_svg` gives it.
        caption, detail: without escaping.
    """
    shown = f"{escape(caption)} <span>{escape(detail)}</span>"
    return f"<figure{' class=alarmed' if alarmed else ''}><figcaption>{shown}</figcaption>{svg}</figure>"


def _cell(cell: Cell, head: str) -> str:
    label = "" if cell.kind == "name" else f' data-label="{escape(head)}"'
    return f'<td class="{escape(cell.kind)}"{label}>{escape(cell.text)}</td>'
