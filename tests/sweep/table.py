"""The table of model types in docs/support.md, made from the outcomes that `make sweep` writes.

PYTHONPATH=tests python -m sweep.table docs/support.json docs/support.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .outcomes import NOTE

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
COLUMNS = {
    "forward": ("forward", "gradient", "next_token_logits", "logits_at"),
    "generate": ("generate",),
    "bank": ("bank_logits", "bank_generate"),
    "deep prompts": ("deep",),
}
"""Columns, and the entries that each of them sums up."""
HEADS = {"CausalLM": "decoder", "Seq2SeqLM": "encoder-decoder"}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per model type, then the reasons for what is refused."""
    reasons: dict[str, list[str]] = defaultdict(list)
    built = {name: entries for name, entries in result["types"].items() if "model" not in entries}
    lines = [
        f"transformers {result['transformers']}, torch {result['torch']}: {len(built)} of {len(result['types'])} types "
        "were built with random weights and compared with each row run alone, without padding.",
        "",
        "| type | head | " + " | ".join(COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name, entries in built.items():
        head, model_type = name.split(":")
        cells = []
        for parts in COLUMNS.values():
            found = [entries[part] for part in parts if part in entries]
            cells.append(_cell(found))
            for outcome in found:
                if outcome.startswith("refused: ") and model_type not in reasons[_reason(outcome)]:
                    reasons[_reason(outcome)].append(model_type)
        lines.append(f"| {model_type} | {HEADS[head]} | " + " | ".join(cells) + " |")
    torn = [name.split(":")[1] for name, entries in built.items() if NOTE in entries]
    lines += ["", f"transformers' own `generate` gives another text than its `forward`: {', '.join(torn) or 'none'}."]
    lines += ["", "Reasons for what is refused:", ""]
    lines += [f"* {reason}: {', '.join(types)}" for reason, types in sorted(reasons.items()) if types]
    others = [name.split(":")[1] for name in result["types"] if name not in built]
    lines += ["", f"Not built tiny, or not runnable on token ids alone: {', '.join(dict.fromkeys(others))}."]
    return "\n".join(lines)


def _cell(outcomes: list[str]) -> str:
    if not outcomes:
        return ""
    for kind in ("wrong", "refused"):
        if any(outcome.startswith(kind) for outcome in outcomes):
            return kind
    return outcomes[0]


def _reason(outcome: str) -> str:
    """The reason without the name of the class and without figures, so that types with one reason are together."""
    text = outcome.removeprefix("refused: ")
    _, found, reason = text.partition(": ")
    text = reason if found else text.partition(" ")[2]
    text = text.partition(". ")[0].partition(" by ")[0]
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def written(document: str, result: dict[str, Any]) -> str:
    """The document with a new table between the two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(result)}\n\n{END}{after}"


if __name__ == "__main__":
    source, page = map(Path, sys.argv[1:])
    page.write_text(written(page.read_text(), json.loads(source.read_text())))
