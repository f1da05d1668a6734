"""Figures of a report, as SVG for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..base.figures import BLUE, GREY, RED, clean, inline_svg, new_figure
from .report import DriftTest, Shape, statistics_of

WIDTH, HEIGHT = 4.4, 2.7
SMALL, TEXT = 9, 10
MOST_BARS = 12


def shape_figure(test: DriftTest, shape: Shape) -> str:
    """The reference and the new rows: two distribution functions, or bars."""
    bars = min(len(shape.labels), MOST_BARS)
    figure = new_figure(WIDTH, HEIGHT if shape.values else max(1.6, 0.8 + 0.5 * bars))
    panel = figure.subplots()
    if shape.values:
        panel.step(shape.values, shape.reference, where="post", color=GREY, linewidth=2.2, label="reference")
        panel.step(shape.values, shape.now, where="post", color=RED if test.alarm else BLUE, linewidth=1.6, label="now")
        panel.set_xlabel(f"{test.name} ({test.unit})", fontsize=TEXT)
        panel.set_ylabel("share of rows up to it", fontsize=TEXT)
        panel.set_ylim(-0.02, 1.02)
    else:
        _bars(panel, shape, RED if test.alarm else BLUE)
    panel.legend(fontsize=SMALL, frameon=False, loc="best" if shape.values else "upper left")
    return _svg(figure, panel, test.name)


def _bars(panel: Any, shape: Shape, color: str) -> None:
    """Horizontal bars in pairs, the largest changes first."""
    order = sorted(range(len(shape.labels)), key=lambda i: -abs(shape.now[i] - shape.reference[i]))[:MOST_BARS]
    order = [i for i in range(len(shape.labels)) if i in order]
    places = range(len(order))
    for offset, values, shade, name in ((-0.2, shape.reference, GREY, "reference"), (0.2, shape.now, color, "now")):
        panel.barh([at + offset for at in places], [values[i] for i in order], 0.36, color=shade, label=name)
        for at, i in zip(places, order, strict=True):
            panel.text(values[i] + 0.015, at + offset, f"{values[i]:.1%}", va="center", fontsize=SMALL)
    single = len(order) == 1
    panel.set_yticks([] if single else list(places), [] if single else [clean(shape.labels[i]) for i in order])
    panel.set_ylim(len(order) - 0.45, -1.3)  # room for the legend above the first bar
    panel.set_xlim(0, 1.18)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])


def history_figure(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """A test's statistic over time, in the reports that have it; alarms are red."""
    figure = new_figure(WIDTH, HEIGHT)
    panel = figure.subplots()
    found = [(report["time"], statistics_of(report).get(name)) for report in reports]
    points = [(datetime.fromisoformat(time), *one) for time, one in found if one is not None]
    times, values, alarms = zip(*points, strict=True)
    panel.plot(times, values, color=GREY, linewidth=1.2, zorder=1)
    panel.scatter(times, values, c=[RED if alarm else BLUE for alarm in alarms], s=22, zorder=2)
    panel.set_ylabel("statistic", fontsize=TEXT)
    low, high = min(0.0, *values), max(1e-9, *values)
    panel.set_ylim(low - (0.08 * (high - low) if low else 0), high + 0.12 * (high - low))
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=2, maxticks=5)
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return _svg(figure, panel, f"{name} over time")


def _svg(figure: Any, panel: Any, title: str) -> str:
    panel.tick_params(labelsize=SMALL)
    panel.spines[["top", "right"]].set_visible(False)
    return inline_svg(figure, title)
