"""Model cards: ``README.md`` in a prompt's folder, with the metadata that the Hub reads. No network is needed.

A card ends with a comment that holds the digest of its text. So a card that somebody changed is recognised and kept.
"""

from __future__ import annotations

import hashlib
import logging
import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.files import write_atomically
from ..tasks.task import TASK_FILE
from .card_facts import METHODS, CardFacts, card_facts
from .card_text import SCORES, card_body, several_body, shown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

logger = logging.getLogger("softprompt_fast")

CARD_FILE = "README.md"
MARK = re.compile(r"\n<!-- written by softprompt_fast, unchanged: ([0-9a-f]{16}) -->\n")
METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
PEFT_QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
PEFT_LINE = re.compile(r"## Training procedure|### Framework versions|- PEFT \S+")
"""What PEFT adds to the form of a card."""
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The Hub's names of what models of PEFT's kinds do."""
HUB_TASKS = {
    "classification": "text-classification",
    "generation": "text-generation",
    "tagging": "token-classification",
    "answering": "question-answering",
}
"""The Hub's names of the kinds of tasks."""


def write_card(folder: PathLike[str] | str) -> bool:
    """Writes ``README.md`` into an adapter folder, from its files and those of its run beside it.

    A card that was changed by hand, or that another program wrote, is kept, with one log line. The form that PEFT
    leaves with each adapter is replaced if nobody filled it in.

    Returns:
        Whether the card was written.

    Raises:
        FileNotFoundError: no such adapter folder.
    """
    folder = Path(folder)
    file = folder / CARD_FILE
    if file.exists() and not is_generated(file.read_text(encoding="utf-8")):
        logger.warning("%s is kept, because it was changed or is not from here; delete it to get a new one", file)
        return False
    write_atomically(file, card_text(card_facts(folder)))
    return True


def update_card(folder: Path) -> None:
    """Writes the card of a folder whose prompt was saved again, if it has a task: a checkpoint has none."""
    if not (folder / TASK_FILE).is_file():
        return
    try:
        write_card(folder)
    except (OSError, ValueError, TypeError) as error:  # the prompt itself is saved
        logger.warning("%s gets no card: %s", folder, error)


def card_text(facts: CardFacts) -> str:
    """The card of a prompt, metadata included. Equal facts give equal texts."""
    return _marked(_metadata([facts], facts.name), card_body(facts))


def several_text(prompts: list[CardFacts], repository: str) -> str:
    """The card of a repository with several prompts."""
    return _marked(_metadata(prompts, repository.rpartition("/")[2]), several_body(prompts, repository))


def is_ours(text: str) -> bool:
    """Whether a card was written here and nobody changed it since."""
    match = MARK.search(text)
    return match is not None and match.end() == len(text) and match[1] == _digest(text[: match.start()])


def is_generated(text: str) -> bool:
    """Whether no person wrote or changed a card: it is ours, or the form that PEFT leaves, not filled in."""
    return is_ours(text) or _is_form(text)


def _is_form(text: str) -> bool:
    from huggingface_hub import ModelCard, ModelCardData

    found = METADATA.match(text)
    keys = set(re.findall(r"^(\w+):", found[1], re.MULTILINE)) if found is not None else set()
    lines = [line for line in (text[found.end() :] if found is not None else text).splitlines() if line.strip()]
    if not keys <= PEFT_KEYS or not any(line.startswith("- PEFT ") for line in lines):
        return False
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    added = [line for line in lines if line not in form and PEFT_LINE.fullmatch(line) is None]
    if PEFT_QUANTIZED in added:
        added = [line for line in added if line != PEFT_QUANTIZED and re.fullmatch(r"- \w+: .*", line) is None]
    return not added


def _marked(metadata: str, body: str) -> str:
    text = f"---\n{metadata}\n---\n\n{body}\n"
    return f"{text}\n<!-- written by softprompt_fast, unchanged: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _metadata(prompts: list[CardFacts], name: str) -> str:
    """YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    first = prompts[0]
    tags = dict.fromkeys(["softprompt_fast", "soft-prompt", *(METHODS.get(one.method, one.method) for one in prompts)])
    fields: dict[str, Any] = {"library_name": "peft", "tags": list(tags)}
    if first.base is not None and not first.base_is_local:
        fields["base_model"] = first.base
        fields["tags"] += [f"base_model:adapter:{first.base}", "transformers"]
    if first.task_type in PIPELINES:
        fields["pipeline_tag"] = PIPELINES[first.task_type]
    results = [result for one in prompts for result in _results(one)]
    if results:
        fields |= {"model_name": name, "eval_results": results}
    return ModelCardData(**fields).to_yaml().strip()


def _results(facts: CardFacts) -> list[EvalResult]:
    """The held-out scores with their intervals, as the Hub lists them."""
    from huggingface_hub import EvalResult

    after = facts.run.get("after") or {}
    held_out = (facts.run.get("data") or {}).get("held_out") or {}
    files = ", ".join(held_out.get("files") or ()) or "held-out rows"
    kind = facts.task.kind if facts.task is not None else "generation"
    results = [
        EvalResult(
            task_type=HUB_TASKS[kind],
            dataset_type="custom",
            dataset_name=f"{files} ({facts.name})" if facts.subfolder is not None else files,
            dataset_split="held-out",
            metric_type=name,
            metric_name=f"{name} {shown(after, name)}, {after.get('rows', 0):.0f} rows",
            metric_value=after[name],
        )
        for name in SCORES
        if name in after
    ]
    if facts.retention:
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="custom",
                dataset_name=f"{facts.retention['held_out_queries']} held-out queries",
                metric_type="agreement",
                metric_name="same most probable token as with the whole text",
                metric_value=facts.retention["agreement"],
            )
        )
    return results
