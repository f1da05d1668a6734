"""Analysis of a task's data before a prompt is tuned: lengths, classes, repeats, baselines, and a recipe."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.intervals import wilson_interval
from ..evaluation.likelihood import Progress
from ..evaluation.prompt_scoring import score_prompts
from ..hf.architecture import context_length, is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.encoding import without_end, word_ids
from ..tasks.examples import has_target, is_empty, unreadable
from ..tasks.task import Task, names_in
from ..tasks.values import is_missing, label_name, matching_label
from .duplicates import find_duplicates
from .recipe import suggest
from .results import Analysis, LabelWord, Lengths, Recipe


def analyze(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Sequence[Mapping[str, Any]],
    held_out_rows: Sequence[Mapping[str, Any]] = (),
    *,
    sample: int = 500,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Measures data with a model's tokenizer, and scores the model without a prompt.

    Args:
        held_out_rows: baselines are measured on them, or on the training rows if there are none.
        sample: rows for the zero-shot baseline, drawn with ``seed``. 0: no baseline.

    Raises:
        ValueError: no rows, or a column that the template names and the data lack.
    """
    if not train_rows:
        raise ValueError("`train_rows` must hold at least one row, got none")
    if sample < 0:
        raise ValueError(f"`sample` must not be negative, got {sample}")
    encoder_decoder = is_encoder_decoder(model.base_model)
    readable = [row for row in train_rows if unreadable(task, row) is None]
    filled = [row for row in readable if not is_empty(task, row)]
    labelled = [row for row in filled if has_target(task, row)]
    values = [row.get(task.target_column) for row in train_rows]
    unknown = Counter(
        label_name(row[task.target_column], task.target_column)
        for row in readable
        if task.label_words and not is_missing(row.get(task.target_column)) and not has_target(task, row)
    )
    text = _token_counts(tokenizer, [task.text(row) for row in filled], drop_eos=not encoder_decoder)
    ends = encoder_decoder or task.kind == "generation"
    target = [n + ends for n in _token_counts(tokenizer, [task.target(row) for row in labelled], special=False)]
    words = {label: _label_word(task, tokenizer, word, encoder_decoder) for label, word in task.label_words.items()}
    held_out_rows = [row for row in held_out_rows if unreadable(task, row) is None]
    usable = [row for row in held_out_rows if not is_empty(task, row) and has_target(task, row)] or labelled
    counts = Counter(task.label(row) for row in labelled if task.label_words)
    classes = {label: counts[label] for label in task.labels}
    held_out_names = names_in(held_out_rows, task.target_column) if task.label_words else set()
    matched = {name: matching_label(name, task.label_words) for name in held_out_names}
    zero_shot, answers = _zero_shot(model, tokenizer, task, usable, sample, batch_size, seed, progress)
    analysis = Analysis(
        kind=task.kind,
        train_rows=len(train_rows),
        held_out_rows=len(held_out_rows),
        empty_rows=len(train_rows) - len(filled),
        unlabelled_rows=sum(map(is_missing, values)),
        unknown_labels=dict(unknown),
        held_out_labels=sorted(name for name, label in matched.items() if label is None or not counts[label]),
        text=Lengths.of(text),
        target=Lengths.of(target),
        max_length=task.max_length,
        context=context_length(model.base_model),
        cut_by_max_length=_share(n > task.max_length for n in text),
        cut_responses=_share(n > task.max_length for n in target) if task.kind == "generation" else 0.0,
        over_context=0.0,
        classes=classes,
        duplicates=find_duplicates(task, filled, held_out_rows),
        label_words=words,
        first_token_clashes=_clashes(words),
        majority=_majority(task, classes, usable),
        zero_shot=zero_shot,
        zero_shot_answers=answers,
        recipe=Recipe({}, []),
    )
    analysis.recipe = suggest(analysis, task, tokenizer)
    if analysis.context is not None:
        answer = analysis.target.quantiles["max"]
        room = analysis.context - analysis.recipe.choices["num_virtual_tokens"].value - answer
        analysis.over_context = _share(min(n, task.max_length) > room for n in text)
    return analysis


def _token_counts(tokenizer: Any, texts: list[str], *, special: bool = True, drop_eos: bool = False) -> list[int]:
    counts: list[int] = []
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        for ids in tokenizer(part, add_special_tokens=special, truncation=False, verbose=False).input_ids:
            counts.append(max(1, len(without_end(ids, tokenizer) if drop_eos else ids)))
    return counts


def _share(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _label_word(task: Task, tokenizer: Any, word: str, encoder_decoder: bool) -> LabelWord:
    ids = word_ids(task, tokenizer, word, encoder_decoder=encoder_decoder)
    return LabelWord(word, ids, [tokenizer.decode([i]) for i in ids])


def _clashes(words: Mapping[str, LabelWord]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for label, word in words.items():
        if word.ids:
            groups.setdefault(word.ids[0], []).append(label)
    return [labels for labels in groups.values() if len(labels) > 1]


def _majority(
    task: Task, classes: Mapping[str, int], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float | str] | None:
    if task.kind != "classification" or not rows or not any(classes.values()):
        return None
    label = max(classes, key=classes.__getitem__)
    hits = sum(task.label(row) == label for row in rows)
    low, high = wilson_interval(hits, len(rows))
    return {"label": label, "accuracy": hits / len(rows), "accuracy_low": low, "accuracy_high": high}


def _zero_shot(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    sample: int,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, float] | None, dict[str, int]]:
    if not rows or sample == 0:
        return None, {}
    chosen = random.Random(seed).sample(list(rows), min(sample, len(rows)))
    (scores,) = score_prompts(
        model, tokenizer, task, chosen, {"none": None}, batch_size=batch_size, progress=progress
    ).values()
    answers: dict[str, int] = {}
    if scores.predicted is not None:
        said = Counter(scores.predicted.tolist())
        answers = {label: said[i] for i, label in enumerate(task.labels)}
    return scores.summary(), answers
