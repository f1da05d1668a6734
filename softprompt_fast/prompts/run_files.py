"""What the files beside a prompt's folder say of the run that made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..base.files import read_json
from .peft_files import CONFIG_FILE, WEIGHTS_FILE

METRICS_FILE, RUN_FILE, SEARCH_FILE = "metrics.json", "checkpoints/run.json", "search.json"
"""Files of ``tune`` and ``search`` beside a prompt's folder."""
RETENTION_FILE = "retention.json"
"""The file of ``compress`` beside the folders of its prompts."""
COMPOSITION_FILE = "composition.json"
"""In the folder of a document's prompt: what was trained with it. ``distillation/joining.py`` reads it."""
RECORD_FILE = "version.json"
"""The record in the folder of a version of the registry."""
MAIN_SCORES = ("span_f1", "exact_match", "accuracy")
"""The score that counts for each kind of task; the first that a run has."""
DIGEST = "weights_sha256"
"""Key of the digest of the weights that scores belong to: a prompt can be saved again with other values."""


def weights_digest(folder: Path) -> str | None:
    """SHA-256 of a prompt's weights; None: there are none."""
    file = folder / WEIGHTS_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def version_facts(folder: Path) -> dict[str, Any]:
    """What the record of a version says of its run, as :func:`run_facts` gives it."""
    record = read_json(folder / RECORD_FILE) or {}
    if not record.get("scores"):
        return {}
    return {"settings": record["settings"], "before": record["scores_without_prompt"], "after": record["scores"]}


def retention_facts(folder: Path) -> dict[str, Any]:
    """What ``compress`` measured of a prompt: ``agreement``, ``kl``, ``first_token``, ``held_out_queries``, ...

    A prompt of another origin, or one that was changed since, has none.
    """
    name = folder.resolve().name
    report = read_json(folder.resolve().parent / RETENTION_FILE) or {}
    for one in report.get("prompts") or ():
        if Path(one["folder"]).name == name and one.get(DIGEST) == weights_digest(folder):
            whole = {key: report[key] for key in ("text_tokens", "training_queries", "held_out_queries", "settings")}
            whole["free_queries"] = report.get("free_queries", 0)
            return whole | one["retention"] | {"init": one["init"]}
    return {}


def run_facts(folder: Path) -> dict[str, Any]:
    """What the files of its run say of a prompt: ``settings``, ``before``, ``after``, ``data``, fingerprints of rows.

    A prompt that was moved away from its run, that was changed since, or that another program made, has none.
    """
    name = folder.resolve().name
    output = folder.resolve().parent
    metrics = read_json(output / METRICS_FILE)
    run = read_json(output / RUN_FILE) or {}
    if metrics is None:
        return _search_facts(output, name)
    if run and f"train_rows of {name!r}" not in run:
        return {}  # the files are those of another prompt's run
    facts = metrics | (metrics.get("prompts") or {}).get(name, {})
    if "after" not in facts or (DIGEST in facts and facts[DIGEST] != weights_digest(folder)):
        return {}
    rows = {key: run.get(f"{key} of {name!r}") for key in ("train_rows", "held_out_rows")}
    settings = (facts.get("settings") or {}) | run.get(f"settings of {name!r}", {})  # a member has some of its own
    told = {"before": facts.get("before"), "after": facts["after"], "data": facts.get("data") or {}}
    return {"settings": settings} | told | rows


def _search_facts(output: Path, name: str) -> dict[str, Any]:
    """The facts of the prompt that a search recommends."""
    report = read_json(output / SEARCH_FILE)
    if report is None or not (output / name / CONFIG_FILE).is_file():
        return {}
    chosen = next(one for one in report["candidates"] if one["number"] == report["recommended"])
    weights = (output / name / WEIGHTS_FILE).read_bytes()
    for rung in sorted(output.glob(f"trials/{chosen['number']:03d}-*/rung-*"), reverse=True):
        trained = rung / name / WEIGHTS_FILE
        metrics = read_json(rung / METRICS_FILE)
        if metrics is not None and trained.is_file() and trained.read_bytes() == weights:
            return {
                "settings": metrics["settings"] | {"steps": chosen["rungs"][-1]["total_steps"]},
                "before": report["before"],
                "after": chosen["rungs"][-1]["scores"],
            } | _rows_of_search(output)
    return {}


def _rows_of_search(output: Path) -> dict[str, Any]:
    """Fingerprints of the rows, from the journal of the search."""
    try:
        lines = [json.loads(line) for line in (output / "study.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        return {}
    facts: dict[str, Any] = next(
        (line["user_attr"]["facts"] for line in lines if "facts" in line.get("user_attr", ())), {}
    )
    return {key: facts.get(key) for key in ("train_rows", "held_out_rows")}
