"""Rows as token ids, after an instruction and labelled examples if a method has them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks.encoding import encode_targets, encode_text, without_end
from ..tasks.examples import Examples
from ..tasks.task import Task


@dataclass
class Encoder:
    """Texts and targets of a task's rows.

    Every method reads the same text: ``task.max_length`` does not count the text in front.
    """

    task: Task
    tokenizer: Any
    prefix: str = ""
    """Text in front of every row's."""

    def text(self, row: Mapping[str, Any]) -> list[int]:
        alone = encode_text(self.task, row, self.tokenizer)
        if not self.prefix:
            return alone
        text = self.task.text(row)
        if len(self._ids(text)) <= self.task.max_length:
            return self._ids(self.prefix + text)
        return self._ids(self.prefix) + alone

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        return [self.text(row) for row in rows]

    def targets(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        return encode_targets(self.task, rows, self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, truncation=False, add_special_tokens=self.task.special_tokens).input_ids
        return without_end(ids, self.tokenizer)


def common_start(texts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all texts begin with."""
    start = list(texts[0])
    for text in texts[1:]:
        same = 0
        while same < min(len(start), len(text)) and start[same] == text[same]:
            same += 1
        del start[same:]
    return start


def draw_shots(task: Task, rows: Examples, shots: int, seed: int) -> Examples:
    """Training rows to show; for classification, equally many of each label if possible. The seed gives the order."""
    order = list(rows)
    generator = random.Random(seed)
    generator.shuffle(order)
    if task.kind != "classification":
        return order[:shots]
    by_label = {label: [row for row in order if task.label(row) == label] for label in task.labels}
    chosen: Examples = []
    labels = list(by_label)
    generator.shuffle(labels)
    while len(chosen) < shots and any(by_label.values()):
        for label in labels:
            if by_label[label] and len(chosen) < shots:
                chosen.append(by_label[label].pop())
    generator.shuffle(chosen)  # else the labels would follow a pattern
    return chosen


def shots_text(task: Task, instruction: str, rows: Examples, separator: str) -> str:
    return instruction + "".join(f"{task.text(row)}{task.target(row)}{separator}" for row in rows)


def fitting_shots(
    task: Task,
    tokenizer: Any,
    instruction: str,
    train: Examples,
    shots: int,
    seed: int,
    separator: str,
    room: int | None,
) -> tuple[str, Examples]:
    """The text of as many shots as fit into ``room`` tokens (None: any number), and their rows.

    Rows longer than ``task.max_length`` are not shown. If not all shots fit, fewer are drawn, so that the labels stay
    balanced.

    Raises:
        ValueError: not even one fits.
    """
    alone = Encoder(task, tokenizer)
    for count in range(shots, 0, -1):
        chosen = draw_shots(task, train, count, seed)
        text = shots_text(task, instruction, chosen, separator)
        short = all(len(alone._ids(task.text(row))) <= task.max_length for row in chosen)
        if not short and count == shots:
            train = [row for row in train if len(alone._ids(task.text(row))) <= task.max_length]
            chosen = draw_shots(task, train, count, seed)
            text = shots_text(task, instruction, chosen, separator)
        if chosen and (room is None or len(alone._ids(text)) <= room):
            return text, chosen
    raise ValueError(f"few-shot: no training row fits into the {room} tokens that the context leaves")
