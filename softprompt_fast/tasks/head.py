"""What a task says of a model's head: which one it is, the names of its outputs, and how long texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .values import WHOLE, matching_label

SEQUENCE, TAGS, ANSWERS = "sequence-classification", "token-classification", "question-answering"
KIND_OF_HEAD = {SEQUENCE: "classification", TAGS: "tagging", ANSWERS: "answering"}
"""The heads, and the kind of task that each one answers."""
STRIDE, ANSWER_TOKENS = 128, 30


@dataclass(frozen=True)
class Head:
    """The head that answers a task, instead of a language-modelling head."""

    name: str
    """"sequence-classification", "token-classification" or "question-answering"."""
    labels: list[str] = field(default_factory=list)
    """The label of each output, in their order; empty for question answering."""
    stride: int = STRIDE
    """Question answering: tokens that two parts of a long context have in common."""
    answer_tokens: int = ANSWER_TOKENS
    """Question answering: longest answer in tokens."""

    def __post_init__(self) -> None:
        if self.name not in KIND_OF_HEAD:
            raise ValueError(f"`head` must be one of {', '.join(KIND_OF_HEAD)}, got {self.name!r}")
        if self.name == ANSWERS:
            if self.labels:
                raise ValueError(f"`labels` cannot be combined with the head {self.name}, got {self.labels}")
        elif len(set(self.labels)) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"`labels` must be at least two different labels, got {self.labels}")
        if self.stride < 0:
            raise ValueError(f"`stride` must be an integer from 0, got {self.stride}")
        if self.answer_tokens < 1:
            raise ValueError(f"`answer_tokens` must be a positive integer, got {self.answer_tokens}")

    @property
    def kind(self) -> str:
        """The kind of task."""
        return KIND_OF_HEAD[self.name]


def in_order(labels: Sequence[str]) -> list[str]:
    """Labels sorted: by value if all are whole numbers, so that class 2 comes before class 10."""
    if all(WHOLE.fullmatch(f"{label}.") for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def labels_of_checkpoint(labels: Sequence[str], own: Sequence[str]) -> list[str] | None:
    """The names of a trained head's outputs, in the spelling of the data; None: the data have other labels.

    A label of the data is one of the checkpoint's if the texts are equal, or differ in case only, or if it is the
    number of the output.

    Args:
        labels: of the data.
        own: of the checkpoint, in the order of its outputs.
    """
    found: dict[int, str] = {}
    lower = [name.casefold() for name in own]
    numbers = [str(number) for number in range(len(own))]
    for names in (list(own), lower, numbers):
        places = {}
        for label in labels:
            match = matching_label(label.casefold() if names is lower else label, names)
            if match is None or names.count(match) != 1:
                break
            places[names.index(match)] = label
        if len(places) == len(labels):
            found = places
            break
    return [found.get(place, name) for place, name in enumerate(own)] if found else None
