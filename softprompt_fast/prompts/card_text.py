"""The text of a model card: what the prompt is, how good it is, how it is used, and where it does not work."""

from __future__ import annotations

import json
import platform
import shlex
from typing import Any
from urllib.parse import quote

from ..base.machine import package_versions
from ..base.version import __version__
from ..tasks.task import Task
from .card_facts import CardFacts, without_folders
from .peft_files import UPDATED
from .run_files import MAIN_SCORES

LIBRARIES = ("torch", "transformers", "safetensors")
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""transformers' class for each kind of model; others are loaded without a head."""
QUESTIONS = "QUESTION_ANS"
"""Loaded by our function: transformers' class gives the decoder of a language model random weights."""
SCORES = (*MAIN_SCORES, "f1", "loss", "perplexity")
"""Scores of a run. Those with a 95 % interval have its ends in ``<name>_low`` and ``<name>_high``."""


def card_body(facts: CardFacts) -> str:
    """The card of one prompt, without its metadata."""
    sections = [
        _heading(facts),
        _task(facts.task),
        _scores(facts.run),
        _retention(facts.retention),
        _data(facts.run, facts.retention),
        _use(facts),
        _limits(facts),
        _settings(facts.run or facts.retention),
        _versions(),
    ]
    return "\n\n".join(section for section in sections if section)


def several_body(prompts: list[CardFacts], repository: str) -> str:
    """The card of a repository with several prompts, without its metadata."""
    links = [f"{quote(one.subfolder or '')}/README.md" for one in prompts]
    rows = [
        f"| [`{one.name}`]({link}) | {one.method} | {one.tokens} | {_short_score(one)} |"
        for one, link in zip(prompts, links, strict=True)
    ]
    table = "\n".join(["| prompt | method | virtual tokens | held-out score |", "|---|---|---|---|", *rows])
    title = f"# {repository.rpartition('/')[2]}"
    what = f"{len(prompts)} soft prompts for {_base(prompts[0])}. Made with softprompt_fast."
    return "\n\n".join([title, what, table, _use(prompts[0]), _versions()])


def _heading(facts: CardFacts) -> str:
    what = "keys and values of every layer" if facts.deep else "vectors at the input"
    weights = "The model's own weights are unchanged."
    if facts.has_head:
        weights = "Trained weights of the model's head come with it. The model's other weights are unchanged."
    return (
        f"# {facts.name}\n\nA soft prompt for {_base(facts)}. It holds {facts.tokens} trained virtual tokens: {what} "
        f"({facts.method}). {weights} Made with softprompt_fast."
    )


def _base(facts: CardFacts) -> str:
    if facts.base is None:
        return "a model without a name"
    return f"`{facts.base}`" + (", a model that is not on the Hub under this name" if facts.base_is_local else "")


def _task(task: Task | None) -> str:
    if task is None:
        return ""
    lines = [
        "## Task",
        "",
        f"{task.kind.capitalize()}. The model reads each row as this text:",
        "",
        _block(task.template),
    ]
    labels: Any = None
    if task.head is not None and task.labels:
        each = "word" if task.kind == "tagging" else "text"
        lines += ["", f"The model's head gives each {each} one of these labels, which are its outputs in their order:"]
        labels = task.labels
    elif task.kind == "answering":
        lines += ["", "The model's head marks the answer in the text of the last column."]
    elif task.kind == "classification":
        lines += ["", "These are the labels and the words that the model says for them:"]
        labels = task.label_words
    if labels is not None:
        lines += ["", _block(json.dumps(labels, indent=2, ensure_ascii=False), "json")]
    parts = "; longer ones are read in parts" if task.kind == "answering" else ""
    lines += [
        "",
        f"The answer's column is {_inline(task.target_column)}. Texts may have {task.max_length} tokens{parts}.",
    ]
    return "\n".join(lines)


def _scores(run: dict[str, Any]) -> str:
    after, before = run.get("after") or {}, run.get("before") or {}
    names = [name for name in SCORES if name in after]
    if not names:
        return ""
    rows = [f"| {name} | {shown(after, name)} | {shown(before, name) if name in before else '-'} |" for name in names]
    return "\n".join(
        [
            "## Scores",
            "",
            f"Measured on {after.get('rows', 0):.0f} held-out rows. These also chose the checkpoint, so the scores are "
            "optimistic. In brackets: 95 % intervals.",
            "",
            "| score | with the prompt | before tuning |",
            "|---|---|---|",
            *rows,
        ]
    )


def shown(scores: dict[str, Any], name: str) -> str:
    """A score with its interval, such as "0.912 (0.871 to 0.942)"."""
    low, high = f"{name}_low", f"{name}_high"
    ends = f" ({scores[low]:.3f} to {scores[high]:.3f})" if low in scores and high in scores else ""
    return f"{scores[name]:.3f}{ends}"


def _short_score(facts: CardFacts) -> str:
    after = facts.run.get("after") or {}
    name = next((name for name in SCORES if name in after), None)
    return "-" if name is None else f"{name} {shown(after, name)}"


def _retention(measured: dict[str, Any]) -> str:
    if not measured:
        return ""
    rows = {"same token": "agreement", "same first token": "first_token", "KL divergence per token (nats)": "kl"}
    values = {label: measured[key] for label, key in rows.items()}
    free = measured.get("rouge_l") is not None  # retention.json of earlier versions has none
    if free:
        values |= {"ROUGE-L F1": measured["rouge_l"], "same text": measured["same_text"]}
        values |= {_inline(str(name)): value for name, value in (measured.get("scores") or {}).items()}
    both = f" Both continued {measured['free_queries']} of them freely (ROUGE-L and below)." if free else ""
    return "\n".join(
        [
            "## Retention",
            "",
            f"The prompt replaces a text of {measured['text_tokens']} tokens. On {measured['held_out_queries']} "
            f"held-out queries the model with the prompt was compared with the model with the whole text.{both}",
            "",
            "| | |",
            "|---|---|",
            *[f"| {label} | {value:.3f} |" for label, value in values.items()],
        ]
    )


def _data(run: dict[str, Any], retention: dict[str, Any]) -> str:
    lines = []
    for label, key in (("Training", "train"), ("Held out", "held_out")):
        one = (run.get("data") or {}).get(key)
        if one:
            files = f", from {', '.join(map(_inline, one['files']))}" if one["files"] else ""
            lines.append(f"* {label}: {one['rows']} rows{files}")
    if retention:
        lines = [f"* Training: {retention['training_queries']} queries without answers"]
        lines += [f"* Held out: {retention['held_out_queries']} queries"]
    return "\n".join(["## Data", "", *lines]) if lines else ""


def _use(facts: CardFacts) -> str:
    imported, load = _loading(facts)
    kind = "DeepPromptModel" if facts.deep else "SoftPromptModel"
    ours = [
        imported,
        f"from softprompt_fast import {kind}",
        "",
        load,
        f"tuned = {kind}.from_pretrained(model, {_text(facts.source)})",
    ]
    whole = facts.source if facts.subfolder is None else f"{facts.source}#{facts.subfolder}"
    lines = ["## Use", "", _block("\n".join(ours), "python")]
    if facts.task is not None:
        lines += ["", "On the command line:", ""]
        lines += [
            _block(
                f"softprompt-fast predict --prompt {shlex.quote(whole)} --data rows.jsonl --output answers.jsonl",
                "bash",
            )
        ]
    if facts.method == UPDATED:
        return "\n".join([*lines, "", "PEFT cannot read this prompt, because it has a token update."])
    inside = "" if facts.subfolder is None else f", subfolder={_text(facts.subfolder)}"
    theirs = [
        "from peft import PeftModel",
        imported,
        "",
        load,
        f"model = PeftModel.from_pretrained(model, {_text(facts.source)}{inside})",
    ]
    return "\n".join([*lines, "", "With PEFT:", "", _block("\n".join(theirs), "python")])


def _loading(facts: CardFacts) -> tuple[str, str]:
    """The code that imports what loads the base model, and the code that loads it."""
    base = _text(facts.base if facts.base is not None and not facts.base_is_local else "path/to/the/base/model")
    if facts.task_type == QUESTIONS:
        return "from softprompt_fast.hf import load_model_with_head", (
            f'model = load_model_with_head({base}, "question-answering").model'
        )
    auto = AUTO_CLASSES.get(facts.task_type or "", "AutoModel")
    options = "" if facts.outputs is None else f", num_labels={facts.outputs}"
    return f"from transformers import {auto}", f"model = {auto}.from_pretrained({base}{options})"


def _limits(facts: CardFacts) -> str:
    lines = [
        "* The prompt works with the weights it was trained on and with no others, not even those of a fine-tuned copy."
    ]
    if facts.fingerprint is not None:
        lines.append(f"  Their fingerprint is `{facts.fingerprint}`. softprompt_fast refuses other weights.")
    lines.append(
        "* softprompt_fast gives each row the result that it has alone, whatever the padding. Other programs may give "
        "another result where padding is between the prompt and the text."
    )
    if facts.task is not None and not facts.task.special_tokens:
        lines.append(
            "* Texts are read without special tokens: the tokenizer must not add a BOS token after the prompt."
        )
    return "\n".join(["## Limits", "", *lines])


def _settings(run: dict[str, Any]) -> str:
    settings = {key: value for key, value in (run.get("settings") or {}).items() if value is not None}
    if not settings:
        return ""
    text = json.dumps(without_folders(settings), indent=2, ensure_ascii=False, default=str)
    return "\n".join(["## Settings", "", _block(text, "json")])


def _versions() -> str:
    versions = {"softprompt_fast": __version__, "python": platform.python_version()} | package_versions(LIBRARIES)
    known = [f"{name} {version}" for name, version in versions.items()]
    return f"## Versions\n\nThis card was written with {', '.join(known)}."


def _text(value: str) -> str:
    """A text in Python code."""
    return json.dumps(value, ensure_ascii=False)


def _inline(text: str) -> str:
    """Code within a line, whose fence the text cannot close."""
    text, fence = " ".join(text.split()), "`"
    while fence in text:
        fence += "`"
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _block(text: str, language: str = "text") -> str:
    """A code block whose fence the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
