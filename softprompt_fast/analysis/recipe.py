"""Settings suggested for a task from an analysis of its data. They are starting points, each with its reason."""

from __future__ import annotations

import math
from typing import Any

from ..tasks.encoding import token_ids, word_ids
from ..tasks.task import Task
from ..tasks.words import alike, begins_another, same_tokens, spaced
from ..tuning.settings import DEFAULT_STEPS, instruction
from ..tuning.settings import DEFAULT_TOKENS as VIRTUAL_TOKENS
from .results import Analysis, Choice, Recipe

STEPS_PER_LABEL = DEFAULT_STEPS // 2
"""The default number of steps was measured on tasks with two labels (docs/recipes.md)."""
MOST_STEPS = 3000
FEW_ROWS = 100
FEW_PER_CLASS = 10
IMBALANCE = 5.0
"""Rows of the largest class over those of the smallest."""


def suggest(analysis: Analysis, task: Task, tokenizer: Any) -> Recipe:
    """A recipe for the analysed data."""
    choices = {"num_virtual_tokens": _virtual_tokens(analysis)}
    choices["batch_size"] = _batch_size(analysis)
    choices["max_length"] = _max_length(analysis, choices["num_virtual_tokens"].value)
    choices["steps"] = _steps(analysis, choices["batch_size"].value)
    if analysis.kind == "classification":
        choices["label_words"] = _label_words(analysis, task, tokenizer)
    choices["init"] = _init(analysis, choices, tokenizer)
    return Recipe(choices, _warnings(analysis, choices["max_length"].value))


def _usable(analysis: Analysis) -> int:
    return len(analysis.target.tokens)


def _virtual_tokens(analysis: Analysis) -> Choice:
    count, reason = VIRTUAL_TOKENS, "beyond 20 vectors the gain is small for most models (Lester et al. 2021, 3.2)"
    if len(analysis.classes) > VIRTUAL_TOKENS:
        count = min(len(analysis.classes), 100)
        reason = f"{len(analysis.classes)} labels: a vector for each to start from, 100 at most"
    elif _usable(analysis) < FEW_ROWS:
        count, reason = 10, f"{_usable(analysis)} rows: fewer numbers to fit"
    if analysis.context is not None and count > analysis.context // 4:
        count = max(1, analysis.context // 4)
        reason = f"a quarter of the model's context of {analysis.context} at most, to leave room for the text"
    return Choice(count, reason)


def _batch_size(analysis: Analysis) -> Choice:
    rows = _usable(analysis)
    if rows >= 8 * 32:
        return Choice(32, "as in Lester et al. 2021; the prompt runs once per batch, so larger batches cost less a row")
    size = max(1, min(32, 2 ** int(math.log2(max(rows, 8) / 8))))
    return Choice(size, f"{rows} rows: at least 8 steps per pass over them")


def _max_length(analysis: Analysis, virtual_tokens: int) -> Choice:
    longest = analysis.text.quantiles["max"]
    length = max(8, 8 * math.ceil(longest / 8))
    reason = f"the longest text has {longest} tokens; short texts cost nothing extra because padding never runs"
    if analysis.text.quantiles["p99"] * 4 < longest:
        typical = analysis.text.quantiles["p99"]
        length = max(8, 8 * math.ceil(typical / 8))
        reason = f"99 % of the texts have at most {typical} tokens; the longest, {longest}, would only cost memory"
    if analysis.context is not None:
        room = analysis.context - virtual_tokens - analysis.target.quantiles["max"]
        if length > room:
            length = max(1, room)
            reason = f"the context of {analysis.context} less the prompt and the longest answer"
    return Choice(length, reason)


def _steps(analysis: Analysis, batch_size: int) -> Choice:
    if analysis.kind == "classification":
        steps = max(DEFAULT_STEPS, STEPS_PER_LABEL * len(analysis.classes))
        reason = f"{STEPS_PER_LABEL} a label: runs with two labels, in four domains, settled within {DEFAULT_STEPS}"
    else:
        steps, reason = math.ceil(3 * _usable(analysis) / batch_size), "three passes over the rows"
        if steps < DEFAULT_STEPS:
            steps, reason = DEFAULT_STEPS, f"three passes are only {steps} steps"
    if steps > MOST_STEPS:
        return Choice(MOST_STEPS, f"{steps} steps ({reason}) are many; continue with --resume if scores still improve")
    return Choice(steps, reason)


def _label_words(analysis: Analysis, task: Task, tokenizer: Any) -> Choice:
    given = {label: word.word for label, word in analysis.label_words.items()}
    if all(len(word.ids) == 1 for word in analysis.label_words.values()) and not analysis.first_token_clashes:
        return Choice(given, "one token each, all different: one forward pass scores every label")
    better: dict[str, str] = {}
    used: set[int] = set()
    for label, word in given.items():
        for variant in dict.fromkeys((word, *(spaced(cased, task.template) for cased in _cases(word.strip())))):
            ids = word_ids(task, tokenizer, variant)
            if len(ids) == 1 and ids[0] not in used and ids[0] != tokenizer.unk_token_id:
                better[label] = variant
                used.add(ids[0])
                break
    if len(better) == len(given):
        return Choice(better, "another spelling makes each word one token, all different")
    return Choice(given, "no spelling makes each word one token: they are scored whole, where their tokens differ")


def _cases(word: str) -> tuple[str, ...]:
    return word, word.lower(), word.capitalize(), word.upper()


def _init(analysis: Analysis, choices: dict[str, Choice], tokenizer: Any) -> Choice:
    if analysis.kind == "generation":
        return Choice("vocabulary", "vectors of common tokens: nearer to what the model knows than noise")
    words = choices["label_words"].value
    if not all(any(c.isalpha() for c in word) and len(word.strip()) > 1 for word in words.values()):
        return Choice("vocabulary", "the label words say little by themselves (numbers or letters)")
    text = instruction(words)
    if len(token_ids(tokenizer, text)) > choices["num_virtual_tokens"].value:
        return Choice("class_labels", "the label words' vectors name the answers (Lester et al. 2021, 3.2)")
    return Choice("auto", f"a prompt that starts as {text.strip()!r} answers before its first step")


def _warnings(analysis: Analysis, suggested_length: int) -> list[str]:
    warnings = []
    rows, repeats = _usable(analysis), analysis.duplicates
    if rows < FEW_ROWS:
        warnings.append(f"too few rows: {rows} with text and answer; results vary much with the seed below {FEW_ROWS}")
    if analysis.held_out_rows == 0:
        warnings.append("no held-out rows: the baselines are measured on training rows")
    elif analysis.held_out_rows < FEW_ROWS:
        warnings.append(f"few held-out rows: {analysis.held_out_rows} make intervals of about +-10 points or wider")
    for count, what in (
        (analysis.empty_rows, "have no text or no readable one; such rows are left out"),
        (analysis.unlabelled_rows, "have no label or response; such rows are left out"),
        (
            sum(analysis.unknown_labels.values()),
            f"have labels that the task does not name: {list(analysis.unknown_labels)[:5]}; tuning stops with an "
            "error at such rows",
        ),
    ):
        if count:
            warnings.append(f"{count} of {analysis.train_rows} training rows {what}")
    if analysis.held_out_labels:
        warnings.append(f"no training row has the labels {analysis.held_out_labels[:5]} of held-out rows")
    if analysis.kind == "classification":
        warnings += _class_warnings(analysis)
    if repeats.leaks_exact + repeats.leaks_near:
        warnings.append(
            f"leak: {repeats.leaks_exact} held-out rows are also in the training data, {repeats.leaks_near} more "
            "differ only in case, punctuation or spaces; held-out scores would be too good"
        )
    if repeats.conflicts:
        warnings.append(f"{repeats.conflicts} training rows have a text that also has another label")
    if (repeats.exact + repeats.near) > 0.05 * analysis.train_rows:
        warnings.append(f"{repeats.exact + repeats.near} of {analysis.train_rows} training rows repeat an earlier text")
    if analysis.cut_by_max_length > 0:
        warnings.append(
            f"{analysis.cut_by_max_length:.2%} of the texts are longer than max_length={analysis.max_length} and lose "
            f"their beginning; {suggested_length} is suggested"
        )
    if analysis.cut_responses > 0:
        warnings.append(
            f"{analysis.cut_responses:.2%} of the responses are longer than max_length={analysis.max_length} and lose "
            "their end and their end token"
        )
    return warnings


def _class_warnings(analysis: Analysis) -> list[str]:
    warnings = []
    largest, smallest = max(analysis.classes.values()), min(analysis.classes.values())
    rare = [label for label, count in analysis.classes.items() if count < FEW_PER_CLASS]
    if rare:
        warnings.append(f"fewer than {FEW_PER_CLASS} rows of {', '.join(map(repr, rare[:5]))}")
    if largest > IMBALANCE * smallest:
        warnings.append(
            f"imbalance: {largest} rows of the largest class, {smallest} of the smallest; judge by macro F1, and "
            "compare accuracy with the majority baseline"
        )
    words = analysis.label_words
    empty = [label for label, word in words.items() if not word.ids]
    if empty:
        warnings.append(f"label words without any token: {empty[:5]}")
    several = {label: len(word.ids) for label, word in words.items() if len(word.ids) > 1}
    if several:
        shown = ", ".join(f"{label!r} {count}" for label, count in list(several.items())[:5])
        warnings.append(f"multi-token label words ({shown}): they are compared where their tokens differ")
    for labels in analysis.first_token_clashes:
        warnings.append(f"the words of {labels[:5]} begin with the same token: only later tokens differ")
    ids = {label: word.ids for label, word in words.items()}
    if begins_another(ids.values()):
        warnings.append("the tokens of one label word begin those of another: an end token is scored after each word")
    for labels in same_tokens(ids):
        warnings.append(f"the words of {labels[:5]} have the same tokens; tuning refuses such labels")
    for labels in alike(words):
        warnings.append(f"labels {labels[:5]} differ only in case, white space or Unicode form")
    answers = analysis.zero_shot_answers
    if answers and max(answers.values()) > 0.95 * sum(answers.values()):
        said = max(answers, key=answers.__getitem__)
        warnings.append(f"without a prompt the model nearly always says {said!r}; a clearer template may help")
    return warnings
