"""Figures drawn with matplotlib's Agg canvas, without its global state."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

BLUE, RED, GREY = "#4477aa", "#d1495b", "#9a9a9a"

ENDINGS = (".svg", ".png", ".pdf")
SHOWN = 30
"""Most bars and ticks that get a label; more would not be readable."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure that draws with Agg, even if another backend is active."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure_path(path: PathLike[str] | str) -> Path:
    """The path of a figure's file.

    Raises:
        ValueError: no figure can be written to a file with this ending.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"a figure's file must end with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, got {str(path)!r}")
    return path


def save_figure(figure: Any, path: PathLike[str] | str) -> Path:
    """Writes svg, png or pdf, chosen by the path's ending. The same figure gives the same svg."""
    import matplotlib

    path = check_figure_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "softprompt_fast", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def inline_svg(figure: Any, title: str) -> str:
    """An svg element for a page, which refers to nothing outside itself. Black becomes the page's text colour.

    Args:
        title: read to those who do not see the figure. Figures of one page need different titles, because their ids
            begin with them.
    """
    import matplotlib

    stream = io.StringIO()
    settings: Any = {"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"\b(fill|stroke): #000000", r"\1: currentColor", text)
    prefix = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def bars(
    panel: Any,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    colors: str | Sequence[str] = BLUE,
    errors: Any = None,
    title: str = "",
    unit: str = "",
) -> None:
    """Horizontal bars, the first on top."""
    places = range(len(values))
    panel.barh(places, values, color=colors, xerr=errors, error_kw={"elinewidth": 0.8, "ecolor": "#333333"})
    panel.set_yticks(*_thinned([clean(label) for label in labels]), fontsize=7)
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(unit, fontsize=8)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def heat_map(
    figure: Any, panel: Any, values: Sequence[Sequence[float]], labels: Sequence[str], *, title: str = ""
) -> None:
    """A square matrix of cosines; up to 10 labels, the numbers are written into it."""
    image = panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    ticks, shown = _thinned([clean(label) for label in labels])
    panel.set_xticks(ticks, shown, rotation=90, fontsize=7)
    panel.set_yticks(ticks, shown, fontsize=7)
    panel.set_title(title, fontsize=9)
    if len(labels) <= 10:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.6 else "black"
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    bar = figure.colorbar(image, ax=panel, shrink=0.8)
    bar.ax.tick_params(labelsize=7)


def clean(text: str, most: int = 24) -> str:
    """A short label, without characters that matplotlib reads as a formula or cannot draw."""
    text = "".join(c if c.isprintable() else "?" for c in text.replace("$", r"\$"))
    return text if len(text) <= most else text[: most - 3] + "..."


def _thinned(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    step = -(-len(labels) // SHOWN) if labels else 1
    places = list(range(0, len(labels), step))
    return places, [labels[i] for i in places]
