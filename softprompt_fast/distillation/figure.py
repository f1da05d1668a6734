"""The figure of a compression: what is retained against the number of tokens."""

from __future__ import annotations

from typing import Any

from ..base.figures import BLUE, GREY, RED, new_figure
from .result import Compression
from .retention import CUT, NOTHING, POOLED, Retention


def retention_figure(result: Compression) -> Any:
    """Agreement and divergence of the prompts, of the text cut to each number of tokens, and of its mean-pooled parts.

    A horizontal line is the model without the text.
    """
    figure = new_figure(8, 3.4)
    panels = figure.subplots(1, 2)
    lines = {
        "trained": (BLUE, [prompt.retention for prompt in result.prompts]),
        CUT: (RED, [one for one in result.references if one.label == CUT]),
        POOLED: (GREY, [one for one in result.references if one.label == POOLED]),
    }
    nothing = next(one for one in result.references if one.label == NOTHING)
    ticks = [prompt.tokens for prompt in result.prompts]
    for panel, measure, title in (
        (panels[0], "agreement", "same token as the whole text"),
        (panels[1], "kl", "KL per token to the whole text"),
    ):
        for label, (color, points) in lines.items():
            _line(panel, points, measure, color, label)
        panel.axhline(getattr(nothing, measure), color="black", linestyle=":", linewidth=1, label=NOTHING)
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log")
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.minorticks_off()
        panel.set_xlabel("tokens", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1.02)
    panels[1].set_ylim(bottom=0)
    panels[1].legend(fontsize=7, frameon=False)
    return figure


def _line(panel: Any, points: list[Retention], measure: str, color: str, label: str) -> None:
    values = [getattr(one, measure) for one in points]
    panel.plot([one.tokens for one in points], values, "o-", color=color, label=label)
