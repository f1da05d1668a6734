"""Rows of data for commands, and the task that options describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..base.extras import require
from ..base.fields import POSITIVE_INTEGER, TEXTS, check_fields, described, one_of
from .options import DATA

if TYPE_CHECKING:
    from ..tasks.examples import Examples
    from ..tasks.task import Task


@dataclass(frozen=True)
class TaskOptions:
    """How rows of data become a task."""

    kind: str = field(
        default="classification",
        metadata=described(
            "Choose one of the labels (classification), or continue the text (generation).",
            one_of("classification", "generation"),
            group=DATA,
            flags=("--task",),
        ),
    )
    text_column: str = field(default="text", metadata=described("Column of the text, for classification.", group=DATA))
    label_column: str = field(
        default="label", metadata=described("Column of the label, for classification.", group=DATA)
    )
    input_column: str = field(
        default="prompt", metadata=described("Column of the text to continue, for generation.", group=DATA)
    )
    output_column: str = field(
        default="response", metadata=described("Column of the continuation, for generation.", group=DATA)
    )
    template: str | None = field(
        default=None,
        metadata=described(
            r"Text that the model reads, with columns in braces; \n is a line break. By default the text, a line break "
            "and the label column's name (classification), or the input column (generation).",
            group=DATA,
        ),
    )
    label_word: list[str] | None = field(
        default=None,
        metadata=described(
            "Word of a label, as LABEL=WORD. Repeat it for each label. By default the label itself.",
            TEXTS,
            group=DATA,
        ),
    )
    max_length: int = field(
        default=512,
        metadata=described(
            "Longest text in tokens, without the prompt. Longer texts lose their beginning.",
            POSITIVE_INTEGER,
            group=DATA,
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def task(self, rows: Examples, **fields: Any) -> Task:
        """The task on these rows; its labels are those that the rows have."""
        from ..tasks.task import classification_task, generation_task

        template = None if self.template is None else self.template.replace("\\n", "\n")
        if self.kind == "generation":
            return generation_task(
                input_column=self.input_column,
                output_column=self.output_column,
                template=template,
                max_length=self.max_length,
                **fields,
            )
        labelled = [row for row in rows if row.get(self.label_column) is not None]
        return classification_task(
            labelled or rows,
            text_column=self.text_column,
            label_column=self.label_column,
            template=template,
            label_words=label_words(self.label_word, template or "") if self.label_word else None,
            max_length=self.max_length,
            **fields,
        )


def label_words(values: list[str], template: str = "") -> dict[str, str]:
    """The word of each label from LABEL=WORD; a word begins with a space where it needs one after the template."""
    from ..tasks.words import spaced

    words = {}
    for value in values:
        label, equals, word = value.partition("=")
        if not equals or not word:
            raise ValueError(f"--label-word must be LABEL=WORD, got {value!r}")
        words[label] = spaced(word, template)
    return words


def read_rows(source: str, split: str) -> Examples:
    """The rows of a file or of a Hub dataset."""
    require("train", "datasets", purpose="reading data")
    from ..tasks.tables import load_rows

    return load_rows(source, split)


def hold_out(
    rows: Examples, validation: str | None, held_out: float, split: str, seed: int
) -> tuple[Examples, Examples]:
    """Rows, and held-out rows: those of ``validation``, or a part of the rows."""
    from ..tasks.examples import split_rows

    return (rows, read_rows(validation, split)) if validation is not None else split_rows(rows, held_out, seed)
