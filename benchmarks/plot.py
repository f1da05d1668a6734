"""Draws the committed CSV files as the figures of the README and the docs::

python benchmarks/plot.py            # benchmarks/results/*.csv -> docs/figures/*.svg
"""

from __future__ import annotations

import json
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
    """Time of a step for each way of running it."""
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


def rates(rows: pd.DataFrame) -> Any:
    """Test accuracy over the learning rate, with and without the residual form, of both kinds of model."""
    parts = [("learning_rate", "SmolLM2-135M, tweets"), ("encoder_rate", "MiniLM and head, movie reviews")]
    parts = [part for part in parts if (rows["study"] == part[0]).sum() > 1]
    figure, panels = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 3.2), squeeze=False)
    panels = panels[0]
    for panel, (study, title) in zip(panels, parts, strict=True):
        part = rows[rows["study"] == study].copy()
        part[["form", "rate"]] = part["variant"].str.split(" ", expand=True)
        part["rate"] = part["rate"].astype(float)
        for form, color in (("none", COLORS["padded"]), ("residual", COLORS["shared"])):
            line = part[part["form"] == form].sort_values("rate")
            low, high = (abs(line["test_accuracy"] - line[side]) for side in ("test_low", "test_high"))
            panel.errorbar(line["rate"], line["test_accuracy"], (low, high), fmt="o-", color=color, label=form)
        steps = part["steps"].iloc[0] if len(part) else 0
        panel.set(xscale="log", xlabel="learning rate", title=f"{title}, {steps} steps")
    panels[0].set(ylabel="test accuracy, 95 % interval")
    panels[0].legend(frameon=False, fontsize=8, title="reparameterization")
    return figure


def variants(rows: pd.DataFrame) -> Any:
    """Test accuracy of the default and of every variant on tweets."""
    compared = (
        "init",
        "objective",
        "deep",
        "placement",
        "optimizer",
        "form",
        "label_words",
        "batch",
        "ensemble",
        "several",
    )
    part = rows[(rows["domain"] == "tweets") & rows["study"].isin(compared)]
    usual = rows[(rows["study"] == "learning_rate") & (rows["variant"] == "none 0.03")]
    part = pd.concat([usual.assign(study="default", variant="as it is"), part])
    figure, panel = plt.subplots(figsize=(9, 1 + 0.2 * len(part)))
    places = range(len(part))
    errors = [abs(part["test_accuracy"] - part[side]) for side in ("test_low", "test_high")]
    colors = [COLORS["shared"] if study == "default" else COLORS["padded"] for study in part["study"]]
    panel.barh(places, part["test_accuracy"], xerr=errors, color=colors, error_kw={"elinewidth": 0.8})
    panel.set_yticks(places, [f"{s}: {v}" for s, v in zip(part["study"], part["variant"], strict=True)], fontsize=7)
    panel.invert_yaxis()
    if len(usual):
        panel.axvline(usual["test_accuracy"].iloc[0], color=COLORS["shared"], linewidth=0.8)
    panel.set(xlim=(0.5, None), xlabel="test accuracy, 95 % interval", title="SmolLM2-135M, tweets, short runs")
    return figure


def transfer(rows: pd.DataFrame) -> Any:
    """Test accuracy after a short run, started from an instruction and from another domain's prompt."""
    part = rows[rows["study"] == "transfer"]
    figure, panel = plt.subplots(figsize=(6, 3.2))
    domains = list(part["domain"].unique())
    for side, color, label in ((-0.2, COLORS["padded"], "instruction"), (0.2, COLORS["shared"], "another's prompt")):
        bars = part[part["variant"].str.startswith("auto") == (side < 0)].set_index("domain").loc[domains]
        errors = [abs(bars["test_accuracy"] - bars[end]) for end in ("test_low", "test_high")]
        places = [x + side for x in range(len(bars))]
        panel.bar(places, bars["test_accuracy"], 0.38, yerr=errors, color=color, label=label)
    sources = part[~part["variant"].str.startswith("auto")].set_index("domain")["variant"].str.split(",").str[0]
    panel.set_xticks(range(len(domains)), [f"{domain}\n{sources[domain]}" for domain in domains])
    panel.set(ylim=(0.5, 1), ylabel="test accuracy, 95 % interval", title=f"after {part['steps'].iloc[0]} steps")
    panel.legend(frameon=False, fontsize=8, title="started from", ncol=2, loc="upper left")
    return figure


def convergence(rows: pd.DataFrame) -> Any:
    """Held-out accuracy over the time of training."""
    figure, panel = plt.subplots(figsize=(9, 3.2))
    colors = dict(zip(rows["method"].unique(), (COLORS["shared"], COLORS["padded"], COLORS["peft"]), strict=False))
    for _, row in rows.iterrows():
        curve = json.loads(row["curve"])
        label = row["method"] if row["seed"] == rows["seed"].min() else None
        panel.plot([p[1] for p in curve], [p[2] for p in curve], "o-", color=colors[row["method"]], label=label)
    panel.axhline(rows["target"].iloc[0], color="#333333", linewidth=0.8, linestyle=":")
    panel.set(xlabel="seconds of training, evaluations not counted", ylabel="accuracy", xscale="log")
    panel.legend(frameon=False, fontsize=8)
    return figure


PLOTS = {
    "train_cpu": ("train_cpu", training),
    "scaling_cpu": ("scaling_cpu", scaling),
    "serve_cpu": ("serve_cpu", serving),
    "recipes_rates": ("recipes_cpu", rates),
    "recipes_variants": ("recipes_cpu", variants),
    "recipes_transfer": ("recipes_cpu", transfer),
    "convergence_cpu": ("convergence_cpu", convergence),
}
"""Figure -> table and function."""


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "softprompt_fast", "svg.fonttype": "none"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams["figure.constrained_layout.use"] = True
    FIGURES.mkdir(exist_ok=True)
    for name, (table, plot) in PLOTS.items():
        source = RESULTS / f"{table}.csv"
        if source.is_file():
            figure = plot(pd.read_csv(source))
            figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
