"""Draws the committed CSV files as the figures of the README and the docs::

python benchmarks/plot.py            # benchmarks/results/*.csv -> docs/figures/*.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIGURES = HERE.parent / "docs" / "figures"
COLORS = {"peft": "#9a9a9a", "padded": "#6b9ac4", "shared": "#d1495b"}
NAMES = {"peft": "PEFT 0.21.2", "padded": "padded layout", "shared": "shared prompt (default)"}


def training(rows: pd.DataFrame) -> Any:
    """A step's time, by way of running it."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        part = rows[rows["dtype"] == dtype]
        for i, name in enumerate(NAMES):
            places = [x + 0.27 * (i - 1) for x in range(len(part))]
            panel.bar(places, part[f"{name}_s"], 0.25, color=COLORS[name], label=NAMES[name])
        for x, (time, ratio) in enumerate(zip(part["shared_s"], part["shared_over_peft"], strict=True)):
            panel.annotate(f"{ratio:.1f}x", (x + 0.27, time), ha="center", va="bottom", fontsize=8)
        panel.set_xticks(range(len(part)), [f"P={p}, B={b}\nT={t}" for p, b, t in part["P,B,T"].str.split()])
        panel.set(title=dtype, ylabel="seconds per training step")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncol=3, frameon=False, fontsize=8)
    return figure


def scaling(rows: pd.DataFrame) -> Any:
    """A step's time over prompt length, by rows; and over distinct prompts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    one = rows[rows["N"] == 1]
    for style, (count, part) in zip(("-", "--", "-.", ":"), one.groupby("B"), strict=True):
        for name in ("padded", "shared"):
            left.plot(part["P"], part[f"{name}_s"], style, color=COLORS[name], label=f"{NAMES[name]}, B={count}")
    left.set(xlabel="P, virtual tokens of the prompt", yscale="log", ylabel="seconds per training step")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncol=4, frameon=False, fontsize=7)
    many = rows[(rows["B"] == 16) & (rows["P"] == 100)].sort_values("N")
    for name in ("padded", "shared"):
        right.plot(many["N"], many[f"{name}_s"], "o-", color=COLORS[name], label=NAMES[name])
    right.set(xlabel="distinct prompts among 16 rows, P=100", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{rows['text'].iloc[0]} text tokens per step, {rows['dtype'].iloc[0]}", fontsize=9)
    return figure


def serving(rows: pd.DataFrame) -> Any:
    """How many times faster mixed batches on compiled prompts are than one batch per task."""
    figure, panel = plt.subplots(figsize=(9, 3))
    labels = [f"{job}\nP={p}, {n}" for job, p, n in zip(rows["job"], rows["P"], rows["requests"], strict=True)]
    bars = panel.bar(range(len(rows)), rows["ratio"], color=COLORS["shared"])
    panel.bar_label(bars, fmt="%.1f", fontsize=8)
    panel.axhline(1, color=COLORS["peft"], linewidth=0.8)
    panel.set_xticks(range(len(rows)), labels, fontsize=7)
    panel.set(ylabel="times PEFT's speed", title="16 tasks; job, prompt length, requests", ylim=(0, None))
    return figure


PLOTS = {"train_cpu": training, "scaling_cpu": scaling, "serve_cpu": serving}


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "softprompt_fast", "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams["figure.constrained_layout.use"] = True
    FIGURES.mkdir(exist_ok=True)
    for name, plot in PLOTS.items():
        source = RESULTS / f"{name}.csv"
        if source.is_file():
            figure = plot(pd.read_csv(source))
            figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
