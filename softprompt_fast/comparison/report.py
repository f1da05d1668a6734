"""The comparison as one page that needs nothing else: no scripts, no links, figures inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..evaluation.scores import rank
from . import words
from .settings import DEFAULTS, LOOP, RATE_SOURCES, TRAINED
from .verdict import RULES

if TYPE_CHECKING:
    from .run import Comparison
    from .summary import MethodSummary

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


def html(found: Comparison) -> str:
    """The page."""
    from .drawing import cost_figure, inline_svg, scores_figure

    facts = found.facts
    title = f"{facts['data']}: ways to use {facts['model']}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>',
        "<body>",
        f"<h1>{escape(title)}</h1>",
        "<h2>Is prompt tuning the right choice here?</h2>",
        f'<p class="verdict">{escape(found.verdict)}</p>',
        f'<div class="note">The sentence follows these rules:{_list(RULES)}</div>',
        "<h2>Scores</h2>",
        _score_table(found),
    ]
    if any(summary.score is not None for summary in found.summaries):
        parts.append(inline_svg(scores_figure(found), "scores"))
    parts += [_score_notes(found), "<h2>Costs</h2>", _cost_table(found)]
    if any(summary.score is not None for summary in found.summaries):
        parts.append(inline_svg(cost_figure(found), "costs"))
    parts += [
        _cost_notes(found),
        "<h2>Failures</h2>",
        _failures(found),
        "<h2>What was compared</h2>",
        _facts_table(found),
        "<h2>Settings of each method</h2>",
        _settings(found),
        "<h2>Seeds</h2>",
        _seed_table(found),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _score_table(found: Comparison) -> str:
    metric = found.facts["metric"]
    heads = ["method", metric, "95 % interval", "sd over seeds", "seeds", "difference from prompt", "p", "p, corrected"]
    classes = found.facts["task"]["kind"] == "classification"
    heads += ["loss", "macro F1"] if classes else ["perplexity"]
    rows = []
    for s in found.summaries:
        if s.score is None:
            rows.append([_name(s), s.status, *[""] * (len(heads) - 2)])
            continue
        row = [
            _name(s),
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
            row.append(f"{_exp(s.score):.2f}")
        rows.append(row)
    return _table(heads, rows)


def _score_notes(found: Comparison) -> str:
    tests = {s.test for s in found.summaries if s.test}
    kinds = {s.interval for s in found.summaries if s.interval}
    notes = []
    if "wilson" in kinds:
        notes.append("Intervals of a single run's accuracy are Wilson's.")
    if "bootstrap" in kinds:
        notes.append(
            "Bootstrap intervals draw the test rows again (9,999 times), of the mean over seeds; how much the seed "
            "matters is the column beside them."
        )
    if "mcnemar" in tests:
        notes.append("p of single runs: McNemar's exact test on the rows that only one of the two gets right.")
    if "permutation" in tests:
        notes.append("p of several seeds or of losses: permutation test, paired by rows, on means over seeds.")
    notes.append("p values are corrected for the number of methods (Holm). Every method scored the test rows once.")
    notes.append("Methods in which nothing is drawn (zero-shot, instruction, linear-probe) ran once.")
    if found.facts["task"]["kind"] == "generation":
        notes.append("The loss is per token of the responses; lower is better.")
    return f'<div class="note">{_list(notes)}</div>'


def _cost_table(found: Comparison) -> str:
    heads = [
        "method",
        "trainable parameters",
        "stored per task",
        "training",
        "evaluation",
        "peak memory, training",
        "peak memory, inference",
        "1,000 rows in",
        "tokens in front",
        "operations per row",
        "the same, front kept",
    ]
    rows = []
    for s in found.summaries:
        if s.score is None:
            continue
        trained = bool(s.train_seconds)
        rows.append(
            [
                _name(s),
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
    return _table(heads, rows, numbers_from=1)


def _cost_notes(found: Comparison) -> str:
    shown = [s for s in found.summaries if s.score is not None]
    tokens = f"{shown[0].text_tokens:.1f}" if shown else "?"
    loaded = words.size(shown[0].memory_loaded) if shown else "?"
    resettable = all(r.get("memory_resettable", True) for r in found.results)
    notes = [
        "Stored per task: the text in front; the prompt's or adapter's files; the probe's file; for full fine-tuning "
        "the whole model in the dtype it came in.",
        "Training: optimiser steps without evaluation, loading and checkpoints; linear-probe: hidden states of the "
        "training rows and all fits.",
        f"Memory: of the process (interpreter and libraries included), {loaded} with the model loaded and nothing run; "
        "on a GPU, what torch allocates there."
        + ("" if resettable else " This system cannot forget an earlier peak: loading the model counts."),
        f"Test rows have {tokens} tokens on average (template included); tokens in front come on top for each of them.",
        "Operations: matrix products of a forward pass, two per weight and token, and attention, for a row alone; the "
        "last column where keys and values of what stands in front are kept between rows. LoRA is not merged, as for "
        "many adapters on one model; merged it costs what zero-shot does.",
        "1,000 rows in: tokenising included; by softprompt_fast, which runs what rows share once per batch and no "
        "padding; linear-probe and peft-prompt by plain forward calls on padded batches.",
        "peft-prompt is trained as PEFT's users run it (every row carries the prompt, all logits); lora and full with "
        "logits at the answer only; prompt by softprompt_fast.",
    ]
    if not found.facts.get("same_environment", True):
        notes.insert(0, "Results come from runs with different versions or hardware; results.json says which.")
    if found.facts["jobs_at_once"] > 1:
        notes.insert(0, f"{found.facts['jobs_at_once']} jobs ran at once: times are longer than they would be alone.")
    return f'<div class="note">{_list(notes)}</div>'


def _failures(found: Comparison) -> str:
    lines = [f"{s.method}: {reason}" for s in found.summaries for reason in s.reasons]
    if not lines:
        return "<p>None.</p>"
    return f'<div class="failed">{_list(lines)}</div>'


def _facts_table(found: Comparison) -> str:
    facts = found.facts
    task, environment = facts["task"], facts.get("environment", {})
    rows: list[tuple[str, str]] = [("model", _joined({"name": facts["model"], **facts.get("model_facts", {})}))]
    rows.append(("data", facts["data"]))
    for name, count in facts["rows"].items():
        labels = facts["labels"][name]
        shown = f" ({', '.join(f'{label} {number}' for label, number in labels.items())})" if labels else ""
        rows.append((f"{name} rows", f"{count}{shown}"))
    for reason, count in facts["left_out"].items():
        rows.append(("left out", f"{count} of {reason}"))
    if "files" in facts:
        files = {name: value or "a part of the data" for name, value in facts["files"].items()}
        rows.append(("files", _joined(files)))
        rows.append(("split seed", str(facts["split_seed"])))
    rows += [
        ("task", task["kind"]),
        ("template", repr(task["template"])),
        ("label words", _joined({label: repr(word) for label, word in task["label_words"].items()})),
        ("longest text", f"{task['max_length']} tokens"),
        ("seeds", ", ".join(map(str, facts["seeds"]))),
        ("steps, batch size", f"{facts['steps']}, {facts['batch_size']}"),
        ("versions", _joined(environment.get("versions", {}))),
        ("hardware", _joined({k: v for k, v in environment.items() if k != "versions"})),
        ("processes at once", str(facts["jobs_at_once"])),
    ]
    return _table(["", ""], [[escape(name), escape(value)] for name, value in rows if value], numbers_from=9, raw=True)


def _settings(found: Comparison) -> str:
    loop = _joined({name: value for name, value in LOOP.items() if name != "steps"})
    parts = [
        f'<p class="note">{", ".join(TRAINED)}: AdamW, cosine down to 0 after a warm-up of a twentieth of the steps; '
        "cross entropy among the label words where each is one token, else among all tokens; the checkpoint with the "
        f"lowest validation loss is kept. Defaults of the loop: {escape(loop)}.</p>"
    ]
    rows = []
    for s in found.summaries:
        detail: dict[str, Any] = next(
            (r["detail"] for r in found.results if r["method"] == s.method and r.get("detail")), {}
        )
        shown = {name: value for name, value in detail.items() if name not in ("validation", "text in front")}
        cells = [_name(s), escape(s.description), escape(_joined(s.options)), escape(_joined(shown))]
        rows.append([*cells, escape(_rate_source(s))])
    parts.append(
        _table(
            ["method", "what it is", "settings", "of the first run", "learning rate"], rows, numbers_from=9, raw=True
        )
    )
    text = next((r["detail"]["text in front"] for r in found.results if "text in front" in r.get("detail", {})), None)
    if text is not None:
        parts.append(
            f"<details><summary>few-shot: the text in front (first seed)</summary><pre>{escape(text)}</pre></details>"
        )
    return "\n".join(parts)


def _seed_table(found: Comparison) -> str:
    rows = []
    for result in found.results:
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
        found.facts["metric"],
        "best on validation",
        "training",
        "test rows in",
        "whole process",
        "processor, training",
        "processor, test rows",
    ]
    return _table(heads, rows, numbers_from=3)


# --- helpers ---


def _rate_source(summary: MethodSummary) -> str:
    """Where a default learning rate comes from."""
    default = DEFAULTS[summary.method].get("learning_rate")
    if summary.options.get("learning_rate", default) != default:
        return "set by the caller"
    return RATE_SOURCES.get(summary.method, "")


def _best_validation(result: Mapping[str, Any]) -> str:
    """Accuracy or loss of the state that was kept."""
    history = result.get("detail", {}).get("validation", [])
    if not history:
        return ""
    best = max(history, key=lambda scores: rank(scores, "loss"))
    return f"{best.get('accuracy', best['loss']):.4f}"


def _name(summary: MethodSummary) -> str:
    return summary.method


def _exp(value: float) -> float:
    import math

    return math.exp(min(value, 700.0))


def _joined(values: Mapping[str, Any]) -> str:
    parts = [f"{k} {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
    return ", ".join(parts)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 1, raw: bool = False) -> str:
    """Columns from ``numbers_from`` on are aligned as numbers; ``raw``: cells are HTML already."""
    text = "<table>"
    if any(heads):
        text += "<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"
    for row in rows:
        text += "<tr>"
        for place, cell in enumerate(row):
            kind = ' class="n"' if place >= numbers_from else ""
            text += f"<td{kind}>{cell if raw else escape(cell)}</td>"
        text += "</tr>"
    return text + "</table>"
