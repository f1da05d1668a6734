"""The comparison as one HTML page without scripts and links; the figures are inside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..base.figures import inline_svg
from ..evaluation.intervals import perplexity
from ..evaluation.scores import rank
from . import words
from .drawing import cost_figure, scores_figure
from .result import Comparison, ComparisonSetup
from .settings import DEFAULTS, LOOP, RATE_SOURCES, TRAINED
from .summary import MethodSummary
from .verdict import RULES

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70em }
body { margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.92em; display: block; overflow-x: auto }
th, td { text-align: left; padding: 0.25em 0.7em; border-bottom: 1px solid #e4e4e4; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.verdict { font-size: 1.1em; background: #eef3f8; border-left: 4px solid #4477aa; padding: 0.7em 1em }
.failed { color: #a02035 } .note { color: #555; font-size: 0.92em }
pre { font-family: ui-monospace, monospace; font-size: 0.9em; white-space: pre-wrap; background: #f6f6f6 }
svg { max-width: 100%; height: auto }
"""


def html(comparison: Comparison) -> str:
    """The text of the page."""
    setup = comparison.setup
    title = f"{setup.data}: ways to use {setup.model}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>',
        "<body>",
        f"<h1>{escape(title)}</h1>",
        "<h2>Is prompt tuning the right choice here?</h2>",
        f'<p class="verdict">{escape(comparison.verdict)}</p>',
        f'<div class="note">The sentence follows these rules:{_list(RULES)}</div>',
        "<h2>Scores</h2>",
        _score_table(comparison),
    ]
    if comparison.scored:
        parts.append(inline_svg(scores_figure(comparison), "scores"))
    parts += [_score_notes(comparison), "<h2>Costs</h2>", _cost_table(comparison)]
    if comparison.scored:
        parts.append(inline_svg(cost_figure(comparison), "costs"))
    parts += [
        _cost_notes(comparison),
        "<h2>Failures</h2>",
        _failures(comparison),
        "<h2>What was compared</h2>",
        _setup_table(comparison.setup),
        "<h2>Settings of each method</h2>",
        _settings(comparison),
        "<h2>Seeds</h2>",
        _seed_table(comparison),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _score_table(comparison: Comparison) -> str:
    metric = comparison.setup.metric
    heads = ["method", metric, "95 % interval", "sd over seeds", "seeds", "difference from prompt", "p", "p, corrected"]
    classes = comparison.setup.task.kind == "classification"
    heads += ["loss", "macro F1"] if classes else ["perplexity"]
    rows = []
    for s in comparison.summaries:
        if s.score is None:
            rows.append([s.method, s.status, *[""] * (len(heads) - 2)])
            continue
        row = [
            s.method,
            f"{s.score:.4f}",
            f"{s.score_low:.4f} to {s.score_high:.4f}",
            "" if s.score_sd is None else f"{s.score_sd:.4f}",
            str(len(s.seeds)),
            "" if s.difference is None else f"{s.difference:+.4f}",
            words.p_value(s.p),
            words.p_value(s.p_holm),
        ]
        if classes:
            row += [f"{s.loss:.4f}", f"{s.macro_f1:.4f}"]
        else:
            row.append(f"{perplexity(s.score):.2f}")
        rows.append(row)
    return _table(heads, rows, numeric_from=1)


def _score_notes(comparison: Comparison) -> str:
    tests = {s.test for s in comparison.summaries if s.test}
    kinds = {s.interval for s in comparison.summaries if s.interval}
    notes = []
    if "wilson" in kinds:
        notes.append("Intervals of a single run's accuracy are Wilson's.")
    if "bootstrap" in kinds:
        notes.append(
            "Bootstrap intervals are those of the mean over seeds; the test rows are resampled 9,999 times. The next "
            "column shows how much the seed matters."
        )
    if "mcnemar" in tests:
        notes.append("p of single runs: McNemar's exact test on the rows that only one of the two methods gets right.")
    if "permutation" in tests:
        notes.append("p of several seeds or of losses: permutation test, paired by rows, on means over seeds.")
    notes.append("p values are corrected for the number of methods (Holm). Every method scored the test rows once.")
    notes.append("Methods without a random choice (zero-shot, instruction, linear-probe) ran once.")
    if comparison.setup.task.kind == "generation":
        notes.append("The loss is per token of the responses; lower is better.")
    return f'<div class="note">{_list(notes)}</div>'


def _cost_table(comparison: Comparison) -> str:
    heads = [
        "method",
        "trainable parameters",
        "stored per task",
        "training",
        "evaluation",
        "peak memory, training",
        "peak memory, inference",
        "time for 1,000 rows",
        "tokens in front",
        "operations per row",
        "operations, front cached",
    ]
    rows = []
    for s in comparison.scored:
        trained = bool(s.train_seconds)
        rows.append(
            [
                s.method,
                words.count(s.trainable_parameters) if trained else "none",
                words.size(s.stored_bytes),
                words.seconds(s.train_seconds) if trained else "none",
                words.seconds(s.evaluation_seconds) if trained else "none",
                words.size(s.memory_training) if trained else "none",
                words.size(s.memory_inference),
                words.seconds(s.inference_seconds_per_1000),
                f"{s.prefix_tokens:.0f}",
                words.count(s.flops_per_row),
                words.count(s.flops_per_row_cached),
            ]
        )
    return _table(heads, rows, numeric_from=1)


def _cost_notes(comparison: Comparison) -> str:
    scored = comparison.scored
    tokens = f"{scored[0].text_tokens:.1f}" if scored else "?"
    loaded = words.size(scored[0].memory_loaded) if scored else "?"
    resettable = all(r.get("memory_resettable", True) for r in comparison.results)
    notes = [
        "Stored per task: the text in front, the prompt's or adapter's files, or the probe's file. For full "
        "fine-tuning it is the whole model in its original dtype.",
        "Training: optimiser steps without evaluation, loading and checkpoints. For linear-probe: hidden states of the "
        "training rows and all fits.",
        f"Memory: of the process, interpreter and libraries included. With the model loaded and nothing run it is "
        f"{loaded}. On a GPU: the memory that torch allocates there."
        + ("" if resettable else " This system cannot reset a peak, so loading the model counts too."),
        f"Test rows have {tokens} tokens on average, template included. Tokens in front are added to each row.",
        "Operations: matrix products of a forward pass (two per weight and token) and attention, for one row alone. In "
        "the last column the keys and values of the tokens in front are cached between rows. LoRA is not merged, as "
        "with many adapters on one model; merged, it costs the same as zero-shot.",
        "Time for 1,000 rows: includes tokenising. softprompt_fast runs what rows share once per batch and never runs "
        "padding; linear-probe and peft-prompt use plain forward calls on padded batches.",
        "peft-prompt is trained as PEFT's users run it: every row carries the prompt and all logits are computed. lora "
        "and full compute logits at the answer only. prompt is trained by softprompt_fast.",
    ]
    if not comparison.setup.same_environment:
        notes.insert(0, "Results come from runs with different versions or hardware; results.json says which.")
    if comparison.setup.jobs_at_once > 1:
        notes.insert(0, f"{comparison.setup.jobs_at_once} jobs ran in parallel: alone, each takes less time.")
    return f'<div class="note">{_list(notes)}</div>'


def _failures(comparison: Comparison) -> str:
    lines = [f"{s.method}: {reason}" for s in comparison.summaries for reason in s.reasons]
    if not lines:
        return "<p>None.</p>"
    return f'<div class="failed">{_list(lines)}</div>'


def _setup_table(setup: ComparisonSetup) -> str:
    task = setup.task
    rows: list[tuple[str, str]] = [("model", _joined({"name": setup.model, **setup.model_facts})), ("data", setup.data)]
    for name, count in setup.rows.items():
        labels = setup.labels[name]
        shown = f" ({', '.join(f'{label} {number}' for label, number in labels.items())})" if labels else ""
        rows.append((f"{name} rows", f"{count}{shown}"))
    rows += [("left out", f"{count} of {reason}") for reason, count in setup.left_out.items()]
    if setup.files is not None:
        rows.append(("files", _joined({name: file or "a part of the data" for name, file in setup.files.items()})))
        rows.append(("split seed", str(setup.split_seed)))
    rows += [
        ("task", task.kind),
        ("template", repr(task.template)),
        ("label words", _joined({label: repr(word) for label, word in task.label_words.items()})),
        ("longest text", f"{task.max_length} tokens"),
        ("seeds", ", ".join(map(str, setup.seeds))),
        ("steps, batch size", f"{setup.steps}, {setup.batch_size}"),
        ("versions", _joined(setup.environment.get("versions", {}))),
        ("hardware", _joined({k: v for k, v in setup.environment.items() if k != "versions"})),
        ("processes in parallel", str(setup.jobs_at_once)),
    ]
    return _table(["", ""], [[escape(name), escape(value)] for name, value in rows if value], raw=True)


def _settings(comparison: Comparison) -> str:
    loop = _joined({name: value for name, value in LOOP.items() if name != "steps"})
    parts = [
        f'<p class="note">{", ".join(TRAINED)}: AdamW, cosine down to 0 after a warm-up of a twentieth of the steps; '
        "cross entropy among the label words where each is one token, else among all tokens; the checkpoint with the "
        f"lowest validation loss is kept. Defaults of the loop: {escape(loop)}.</p>"
    ]
    rows = []
    for s in comparison.summaries:
        detail: dict[str, Any] = next(
            (r["detail"] for r in comparison.results if r["method"] == s.method and r.get("detail")), {}
        )
        shown = {name: value for name, value in detail.items() if name not in ("validation", "text in front")}
        cells = [s.method, escape(s.description), escape(_joined(s.options)), escape(_joined(shown))]
        rows.append([*cells, escape(_rate_source(s))])
    parts.append(_table(["method", "what it is", "settings", "of the first run", "learning rate"], rows, raw=True))
    text = next(
        (r["detail"]["text in front"] for r in comparison.results if "text in front" in r.get("detail", {})), None
    )
    if text is not None:
        parts.append(
            f"<details><summary>few-shot: the text in front (first seed)</summary><pre>{escape(text)}</pre></details>"
        )
    return "\n".join(parts)


def _seed_table(comparison: Comparison) -> str:
    rows = []
    for result in comparison.results:
        summary = result.get("summary", {})
        score = summary.get("accuracy", summary.get("loss"))
        rows.append(
            [
                result["method"],
                str(result["seed"]),
                result["status"],
                "" if score is None else f"{score:.4f}",
                _best_validation(result),
                words.seconds(result.get("train_seconds")),
                words.seconds(result.get("inference_seconds")),
                words.seconds(result.get("wall_seconds")),
                words.seconds(result.get("processor_seconds")),
                words.seconds(result.get("inference_processor_seconds")),
            ]
        )
    heads = [
        "method",
        "seed",
        "status",
        comparison.setup.metric,
        "best on validation",
        "training",
        "test rows in",
        "whole process",
        "processor, training",
        "processor, test rows",
    ]
    return _table(heads, rows, numeric_from=3)


# --- helpers ---


def _rate_source(summary: MethodSummary) -> str:
    """The source of a default learning rate."""
    default = DEFAULTS[summary.method].get("learning_rate")
    if summary.options.get("learning_rate", default) != default:
        return "set by the caller"
    return RATE_SOURCES.get(summary.method, "")


def _best_validation(result: Mapping[str, Any]) -> str:
    """Accuracy or loss of the checkpoint that was kept."""
    history = result.get("detail", {}).get("validation", [])
    if not history:
        return ""
    best = max(history, key=lambda scores: rank(scores, "loss"))
    return f"{best.get('accuracy', best['loss']):.4f}"


def _joined(values: Mapping[str, Any]) -> str:
    parts = [f"{k} {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
    return ", ".join(parts)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int | None = None, raw: bool = False
) -> str:
    """A table. Columns from ``numeric_from`` on are aligned as numbers; with ``raw`` the cells are HTML."""
    text = "<table>"
    if any(heads):
        text += "<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"
    for row in rows:
        text += "<tr>"
        for place, cell in enumerate(row):
            kind = ' class="n"' if numeric_from is not None and place >= numeric_from else ""
            text += f"<td{kind}>{cell if raw else escape(cell)}</td>"
        text += "</tr>"
    return text + "</table>"
