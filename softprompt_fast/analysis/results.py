"""Results of an analysis: lengths, label words, the recipe, and all of it together."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .duplicates import Duplicates

LEVELS = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Lengths:
    """Lengths in tokens."""

    mean: float
    quantiles: dict[str, int]
    """min, p50, p90, p99, max."""
    tokens: list[int] = field(repr=False)
    """Length of each row; not part of the JSON."""

    @classmethod
    def of(cls, tokens: list[int]) -> Lengths:
        values = np.quantile(tokens, list(LEVELS.values()), method="higher") if tokens else [0] * len(LEVELS)
        return cls(float(np.mean(tokens)) if tokens else 0.0, dict(zip(LEVELS, map(int, values), strict=True)), tokens)


@dataclass
class LabelWord:
    """How the tokenizer splits a label's word."""

    word: str
    ids: list[int]
    tokens: list[str]


@dataclass
class Choice:
    """One suggested setting."""

    value: Any
    reason: str


@dataclass
class Recipe:
    """Suggested settings by name (those of ``tune`` and ``Task``), and warnings to read before trusting a result."""

    choices: dict[str, Choice]
    """num_virtual_tokens, batch_size, max_length, steps, init, and label_words for classification."""
    warnings: list[str]

    def options(self) -> str:
        """The settings as options of ``softprompt-fast train``."""
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


@dataclass
class Analysis:
    """The result of :func:`analyze`."""

    kind: str
    train_rows: int
    held_out_rows: int
    empty_rows: int
    """Training rows without text."""
    unlabelled_rows: int
    """Training rows without a label or response."""
    unknown_labels: dict[str, int]
    """Labels of training rows that the task does not name."""
    held_out_labels: list[str]
    """Labels of held-out rows that no training row has."""
    text: Lengths
    """Lengths of the rendered texts before truncation."""
    target: Lengths
    """Lengths of the label words or responses."""
    max_length: int
    """The task's. Longer texts lose their beginning."""
    context: int | None
    """The model's. None: no fixed limit."""
    cut_by_max_length: float
    """Share of texts."""
    cut_responses: float
    """Share of responses that are longer than ``max_length`` with their end token; 0 for classification tasks."""
    over_context: float
    """Share of rows whose prompt, truncated text and answer do not fit the context."""
    classes: dict[str, int]
    """Training rows per label; empty for generation tasks."""
    duplicates: Duplicates
    label_words: dict[str, LabelWord]
    first_token_clashes: list[list[str]]
    """Groups of labels whose words begin with the same token."""
    majority: dict[str, float | str] | None
    """``label``, ``accuracy`` and its interval of always answering the most frequent training label. Measured on the
    held-out rows if there are any."""
    zero_shot: dict[str, float] | None
    """Scores and 95 % intervals of the model without a prompt, on at most ``sample`` rows. None: no rows to score."""
    zero_shot_answers: dict[str, int]
    """How often the model without a prompt chose each label."""
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for lengths in (values["text"], values["target"]):
            del lengths["tokens"]
        return values
