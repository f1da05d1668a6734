"""Settings suggested for a task from what its data look like. Starting points, each with its reason."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..tasks.encoding import token_ids
from ..tuning.settings import DEFAULT_STEPS, instruction
from ..tuning.settings import DEFAULT_TOKENS as VIRTUAL_TOKENS

if TYPE_CHECKING:
    from .data_analysis import Analysis

STEPS_PER_LABEL = DEFAULT_STEPS // 2
"""The default steps are those that two labels took (docs/recipes.md)."""
MOST_STEPS = 3000
FEW_ROWS = 100
FEW_PER_CLASS = 10
IMBALANCE = 5.0
"""Rows of the largest class over those of the smallest."""


@dataclass
class Choice:
    """One setting."""

    value: Any
    reason: str


@dataclass
class Recipe:
    """Settings by their names (of ``tune`` and ``Task``), and what to look at before trusting a result."""

    choices: dict[str, Choice]
    """num_virtual_tokens, batch_size, max_length, steps, init, and label_words for classification."""
    warnings: list[str]

    def options(self) -> str:
        """As options of ``softprompt-fast train``."""
        names = {
            "num_virtual_tokens": "--virtual-tokens",
            "batch_size": "--batch-size",
            "max_length": "--max-length",
            "steps": "--steps",
            "init": "--init",
        }
        parts = [f"{option} {self.choices[name].value}" for name, option in names.items() if name in self.choices]
        if "label_words" in self.choices:
            pairs = self.choices["label_words"].value.items()
            parts += [f"--label-word {shlex.quote(f'{label}={word.strip()}')}" for label, word in pairs]
        return " ".join(parts)


def suggest(found: Analysis, tokenizer: Any) -> Recipe:
    """A recipe for analysed data."""
    choices = {"num_virtual_tokens": _virtual_tokens(found)}
    choices["batch_size"] = _batch_size(found)
    choices["max_length"] = _max_length(found, choices["num_virtual_tokens"].value)
    choices["steps"] = _steps(found, choices["batch_size"].value)
    if found.kind == "classification":
        choices["label_words"] = _label_words(found, tokenizer)
    choices["init"] = _init(found, choices, tokenizer)
    return Recipe(choices, _warnings(found, choices["max_length"].value))


def _usable(found: Analysis) -> int:
    return len(found.target.tokens)


def _virtual_tokens(found: Analysis) -> Choice:
    count, reason = VIRTUAL_TOKENS, "beyond 20 vectors the gain is small for most models (Lester et al. 2021, 3.2)"
    if len(found.classes) > VIRTUAL_TOKENS:
        count = min(len(found.classes), 100)
        reason = f"{len(found.classes)} labels: a vector for each to start from, 100 at most"
    elif _usable(found) < FEW_ROWS:
        count, reason = 10, f"{_usable(found)} rows: fewer numbers to fit"
    if found.context is not None and count > found.context // 4:
        count = max(1, found.context // 4)
        reason = f"a quarter of the model's context of {found.context} at most, to leave room for the text"
    return Choice(count, reason)


def _batch_size(found: Analysis) -> Choice:
    rows = _usable(found)
    if rows >= 8 * 32:
        return Choice(32, "as in Lester et al. 2021; the prompt runs once per batch, so larger batches cost less a row")
    size = max(1, min(32, 2 ** int(math.log2(max(rows, 8) / 8))))
    return Choice(size, f"{rows} rows: at least 8 steps per pass over them")


def _max_length(found: Analysis, virtual_tokens: int) -> Choice:
    longest = found.text.quantiles["max"]
    length = max(8, 8 * math.ceil(longest / 8))
    reason = f"the longest text has {longest} tokens; short texts cost nothing more, for padding never runs"
    if found.text.quantiles["p99"] * 4 < longest:
        typical = found.text.quantiles["p99"]
        length = max(8, 8 * math.ceil(typical / 8))
        reason = f"99 % of the texts have at most {typical} tokens; the longest, {longest}, would only cost memory"
    if found.context is not None:
        room = found.context - virtual_tokens - found.target.quantiles["max"]
        if length > room:
            length = max(1, room)
            reason = f"what the context of {found.context} leaves beside the prompt and the longest answer"
    return Choice(length, reason)


def _steps(found: Analysis, batch_size: int) -> Choice:
    if found.kind == "classification":
        steps = max(DEFAULT_STEPS, STEPS_PER_LABEL * len(found.classes))
        reason = f"{STEPS_PER_LABEL} a label: two labels of four domains had settled by {DEFAULT_STEPS}"
    else:
        steps, reason = math.ceil(3 * _usable(found) / batch_size), "three passes over the rows"
        if steps < DEFAULT_STEPS:
            steps, reason = DEFAULT_STEPS, f"three passes are only {steps} steps"
    if steps > MOST_STEPS:
        return Choice(MOST_STEPS, f"{steps} steps ({reason}) are many; go on with --resume if it still gains")
    return Choice(steps, reason)


def _label_words(found: Analysis, tokenizer: Any) -> Choice:
    given = {label: word.word for label, word in found.label_words.items()}
    if all(len(word.ids) == 1 for word in found.label_words.values()) and not found.first_token_clashes:
        return Choice(given, "one token each, all different: one look at the next token scores every label")
    better: dict[str, str] = {}
    used: set[int] = set()
    for label, word in given.items():
        for variant in dict.fromkeys((word, *(f" {cased}" for cased in _cases(word.strip())))):
            ids = token_ids(tokenizer, variant)
            if len(ids) == 1 and ids[0] not in used and ids[0] != tokenizer.unk_token_id:
                better[label] = variant
                used.add(ids[0])
                break
    if len(better) == len(given):
        return Choice(better, "another spelling makes each word one token, all different")
    return Choice(given, "no spelling makes each word one token: they are scored whole, one pass per label")


def _cases(word: str) -> tuple[str, ...]:
    return word, word.lower(), word.capitalize(), word.upper()


def _init(found: Analysis, choices: dict[str, Choice], tokenizer: Any) -> Choice:
    if found.kind == "generation":
        return Choice("vocabulary", "vectors of common tokens: nearer to what the model knows than noise")
    words = choices["label_words"].value
    if not all(any(c.isalpha() for c in word) and len(word.strip()) > 1 for word in words.values()):
        return Choice("vocabulary", "the label words say little by themselves (numbers or letters)")
    text = instruction(words)
    if len(token_ids(tokenizer, text)) > choices["num_virtual_tokens"].value:
        return Choice("class_labels", "the label words' vectors name the answers (Lester et al. 2021, 3.2)")
    return Choice("auto", f"a prompt that starts as {text.strip()!r} answers before its first step")


def _warnings(found: Analysis, suggested_length: int) -> list[str]:
    warnings = []
    rows, repeats = _usable(found), found.duplicates
    if rows < FEW_ROWS:
        warnings.append(f"too few rows: {rows} with text and answer; results vary much with the seed below {FEW_ROWS}")
    if found.held_out_rows == 0:
        warnings.append("no held-out rows: the baselines are measured on training rows")
    elif found.held_out_rows < FEW_ROWS:
        warnings.append(f"few held-out rows: {found.held_out_rows} make intervals of about +-10 points or wider")
    for count, what in (
        (found.empty_rows, "have no text"),
        (found.unlabelled_rows, "have no label or response"),
        (
            sum(found.unknown_labels.values()),
            f"have labels that the task does not name: {list(found.unknown_labels)[:5]}",
        ),
    ):
        if count:
            warnings.append(f"{count} of {found.train_rows} training rows {what}; tuning would stop at them")
    if found.kind == "classification":
        warnings += _class_warnings(found)
    if repeats.leaks_exact + repeats.leaks_near:
        warnings.append(
            f"leak: {repeats.leaks_exact} held-out rows stand in the training data, {repeats.leaks_near} more but for "
            "case, punctuation or spaces; held-out scores would be too good"
        )
    if repeats.conflicts:
        warnings.append(f"{repeats.conflicts} training rows have a text that also stands with another label")
    if (repeats.exact + repeats.near) > 0.05 * found.train_rows:
        warnings.append(f"{repeats.exact + repeats.near} of {found.train_rows} training rows repeat an earlier text")
    if found.cut_by_max_length > 0:
        warnings.append(
            f"{found.cut_by_max_length:.2%} of the texts are longer than max_length={found.max_length} and lose their "
            f"beginning; {suggested_length} is suggested"
        )
    return warnings


def _class_warnings(found: Analysis) -> list[str]:
    warnings = []
    largest, smallest = max(found.classes.values()), min(found.classes.values())
    rare = [label for label, count in found.classes.items() if count < FEW_PER_CLASS]
    if rare:
        warnings.append(f"fewer than {FEW_PER_CLASS} rows of {', '.join(map(repr, rare[:5]))}")
    if largest > IMBALANCE * smallest:
        warnings.append(
            f"imbalance: {largest} rows of the largest class, {smallest} of the smallest; judge by macro F1, and "
            "compare accuracy with the majority baseline"
        )
    words = found.label_words
    empty = [label for label, word in words.items() if not word.ids]
    if empty:
        warnings.append(f"label words without any token: {empty[:5]}")
    several = {label: len(word.ids) for label, word in words.items() if len(word.ids) > 1}
    if several:
        shown = ", ".join(f"{label!r} {count}" for label, count in list(several.items())[:5])
        warnings.append(f"multi-token label words ({shown}): scoring takes one pass per label")
    for labels in found.first_token_clashes:
        warnings.append(f"the words of {labels[:5]} begin with the same token: only later tokens tell them apart")
    answers = found.zero_shot_answers
    if answers and max(answers.values()) > 0.95 * sum(answers.values()):
        said = max(answers, key=answers.__getitem__)
        warnings.append(f"without a prompt the model nearly always says {said!r}; a clearer template may help")
    return warnings
