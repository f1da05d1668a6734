"""Rows of data for commands, and the task that options describe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.extras import require
from ..base.fields import POSITIVE_INTEGER, TEXTS, YES_OR_NO, check_fields, described, one_of
from .options import DATA

if TYPE_CHECKING:
    from ..tasks.examples import Examples
    from ..tasks.task import Task


def is_text_file(source: str) -> bool:
    """Whether a source is a text file with a row on each line."""
    return Path(source).suffix.lower() == ".txt"


@dataclass(frozen=True)
class DataOptions:
    """How rows are read."""

    split: str | None = field(
        default=None,
        metadata=described("Split of a Hub dataset, train by default, or of a folder with several.", group=DATA),
    )
    config: str | None = field(default=None, metadata=described("Configuration of a Hub dataset.", group=DATA))
    delimiter: str | None = field(
        default=None,
        metadata=described(
            r"Character between the fields of a csv or tsv file; \t is a tab. By default the file shows it.", group=DATA
        ),
    )
    encoding: str | None = field(
        default=None, metadata=described("Encoding of a text file. By default the file shows it.", group=DATA)
    )
    no_header: bool = field(
        default=False,
        metadata=described(
            "The first row of a csv or tsv file holds data. The columns are called 1, 2, 3 and so on.",
            YES_OR_NO,
            group=DATA,
            flags=("--no-header",),
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def check_used(self, sources: Sequence[str]) -> None:
        """Raises ValueError for options that would be ignored, because all sources are text files."""
        if not sources or not all(map(is_text_file, sources)):
            return
        for name in ("split", "config", "delimiter", "no_header"):
            if getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} cannot be given for a text file, got {sources[0]}")

    def read(self, source: str) -> Examples:
        """The rows of a file, a folder or a Hub dataset."""
        require("train", "datasets", "pyarrow", purpose="reading data")
        from ..tasks.tables import load_rows
        from ..tasks.templates import unescaped

        delimiter = None if self.delimiter is None else unescaped(self.delimiter)
        return load_rows(
            source,
            self.split,
            config=self.config,
            delimiter=delimiter,
            encoding=self.encoding,
            header=not self.no_header,
        )


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
            r"Text that the model reads, with columns in braces; \n is a line break, \t a tab, \\ a backslash; braces "
            "around other text are doubled. By default the text, a line break and the label column's name "
            "(classification), or the input column (generation).",
            group=DATA,
        ),
    )
    chat_column: str | None = field(
        default=None,
        metadata=described(
            "Column of conversations, for generation: the model's chat template makes the text of all turns but the "
            "last answer. By default messages or conversations, if the data have no other text.",
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
        from ..tasks.templates import unescaped

        template = None if self.template is None else unescaped(self.template)
        if self.chat_column is not None and self.kind != "generation":
            raise ValueError("--chat-column cannot be used without --task generation")
        if self.kind == "generation":
            if (columns := self._chat_columns(rows)) is not None:
                if template is not None:
                    raise ValueError("--template cannot be combined with conversations")
                return generation_task(
                    input_column=columns[0],
                    output_column=columns[1],
                    max_length=self.max_length,
                    chat={},
                    special_tokens=False,
                    literal=True,
                    **fields,
                )
            return generation_task(
                input_column=self.input_column,
                output_column=self.output_column,
                template=template,
                max_length=self.max_length,
                **fields,
            )
        return classification_task(
            rows,
            text_column=self.text_column,
            label_column=self.label_column,
            template=template,
            label_words=self._label_words(rows, template or ""),
            max_length=self.max_length,
            **fields,
        )

    def _label_words(self, rows: Examples, template: str) -> dict[str, str] | None:
        from ..tasks.task import names_in

        return label_words(self.label_word, template, names_in(rows, self.label_column)) if self.label_word else None

    def _chat_columns(self, rows: Examples) -> tuple[str, str] | None:
        """The columns of the conversation and of the answer, one column for both if it holds both; None: no chat."""
        from ..tasks.chat import CHAT_COLUMNS, holds_conversations

        def chats(column: str) -> bool:
            return holds_conversations(row.get(column) for row in rows)

        if self.chat_column is not None:
            if not chats(self.chat_column):
                raise ValueError(f"--chat-column must name a column of conversations, got {self.chat_column!r}")
            return self.chat_column, self.chat_column
        if chats(self.input_column):
            output = self.output_column
            if rows and output not in rows[0] and "completion" in rows[0]:
                output = "completion"
            return self.input_column, output
        if rows and self.input_column not in rows[0] and self.template is None:
            return next(((column, column) for column in CHAT_COLUMNS if chats(column)), None)
        return None


def label_words(values: list[str], template: str = "", labels: Collection[str] = ()) -> dict[str, str]:
    """The word of each label from LABEL=WORD; a word begins with a space where it needs one after the template.

    Args:
        labels: labels of the data. One of them may hold "="; else the first "=" ends the label.
    """
    from ..tasks.words import spaced

    words = {}
    for value in values:
        label, equals, word = value.partition("=")
        if not equals or not word:
            raise ValueError(f"--label-word must be LABEL=WORD, got {value!r}")
        known = [name for name in labels if value.startswith(f"{name}=") and len(value) > len(name) + 1]
        if known:
            label = max(known, key=len)
            word = value[len(label) + 1 :]
        words[label] = spaced(word, template)
    return words


def hold_out(
    rows: Examples, validation: str | None, held_out: float, data_options: DataOptions, seed: int
) -> tuple[Examples, Examples]:
    """Rows, and held-out rows: those of ``validation``, or a part of the rows."""
    from ..tasks.examples import split_rows

    return (rows, data_options.read(validation)) if validation is not None else split_rows(rows, held_out, seed)
