"""Answers of a model's head to rows, each with its own prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base.modules import evaluating
from ..evaluation.head_results import result_of
from ..evaluation.heads import head_outputs
from ..hf.architecture import check_room, context_length
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.cuts import counting_cuts
from ..tasks.examples import Examples, is_empty
from ..tasks.head_encoding import Part, encode_parts
from ..tasks.task import Task
from .requests import Request, Result, Unit, answer


@dataclass(eq=False)
class PartUnit(Unit):
    """A part of a row."""

    part: Part = field(default_factory=lambda: Part([]))


def check_one_head(tasks: Mapping[str, Task]) -> None:
    """Refuses tasks of different heads.

    Raises:
        ValueError: with the names of two prompts.
    """
    heads = {name: None if task.head is None else (task.head.name, task.labels) for name, task in tasks.items()}
    first = next(iter(heads))
    for name, head in heads.items():
        if head is None or head != heads[first]:
            raise ValueError(f"the prompts must have one head with the same labels, got {first!r} and {name!r}")


class HeadAnswers:
    """Answers rows in batches of similar lengths; a row that cannot be answered gets ``{"error": reason}``.

    Args:
        model: with a head and the prompts of the tasks.
        tasks: of each prompt, by its name; all have the same head.
        max_batch_rows, max_batch_tokens: bounds of a batch.

    Raises:
        ValueError: the tasks have different heads.
    """

    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any,
        tasks: Mapping[str, Task],
        *,
        max_batch_rows: int = 64,
        max_batch_tokens: int = 4096,
    ) -> None:
        check_one_head(tasks)
        self.model, self.tokenizer, self.tasks = model, tokenizer, dict(tasks)
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self._room = context_length(model.base_model)

    def __call__(self, rows: Examples, names: Sequence[str | None]) -> list[Result]:
        """The answer to each row, in their order; see :func:`~softprompt_fast.evaluation.head_results.result_of`."""
        parts: dict[int, list[Part]] = {}

        def prepare(index: int) -> Request:
            name, row = names[index], rows[index]
            if name is None or name not in self.tasks:
                raise ValueError(f"a row must name one of the prompts {', '.join(self.tasks)}, got {name!r}")
            task = self.tasks[name]
            if is_empty(task, row):
                raise ValueError("the text is empty")
            parts[index] = encode_parts(task, row, self.tokenizer)
            virtual = len(self.model.prompts[name])
            check_room([virtual] * len(parts[index]), [len(part.input_ids) for part in parts[index]], self._room)
            units = [
                PartUnit(index, number, name, part.input_ids, part=part) for number, part in enumerate(parts[index])
            ]
            return Request(list(units), lambda outputs: result_of(task, row, parts[index], outputs))

        def run(units: list[Unit]) -> list[Any]:
            some = [unit.part for unit in units if isinstance(unit, PartUnit)]
            return head_outputs(self.model, self.tokenizer, some, [unit.prompt for unit in units])

        with counting_cuts(), evaluating(self.model):
            return answer(len(rows), prepare, run, max_rows=self.max_batch_rows, max_tokens=self.max_batch_tokens)
