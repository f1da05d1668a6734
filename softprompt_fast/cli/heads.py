"""Options of tasks that a model's head answers, and the model with its head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.fields import NOT_NEGATIVE_INTEGER, POSITIVE_INTEGER, check_fields, described, one_of
from ..tasks.head import ANSWER_TOKENS, ANSWERS, KIND_OF_HEAD, SEQUENCE, STRIDE, TAGS
from .data import TaskOptions
from .options import DATA, PROMPT
from .output import console

if TYPE_CHECKING:
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.examples import Examples
    from ..tasks.task import Task

TrainHead = Annotated[
    bool | None,
    typer.Option(
        "--train-head/--freeze-head",
        help="Whether the head is trained and saved with the prompt (--head). By default a new head is, and one that "
        "the checkpoint holds is not.",
        rich_help_panel=PROMPT,
    ),
]
REFUSED = {
    "kind": "--task",
    "label_word": "--label-word",
    "chat_column": "--chat-column",
    "input_column": "--input-column",
    "output_column": "--output-column",
}
"""Fields of :class:`TaskOptions` that belong to language-modelling heads."""
COLUMNS = {
    SEQUENCE: {"text_column", "label_column", "template"},
    TAGS: {"words_column", "tags_column"},
    ANSWERS: {"question_column", "context_column", "answers_column", "stride", "answer_tokens"},
}
"""The options that say how the rows of each head are read."""


@dataclass(frozen=True)
class HeadOptions:
    """Which head answers, and how rows of data become its task."""

    head: str | None = field(
        default=None,
        metadata=described(
            "Answer with this head of the model instead of words: a label for each text, a tag for each word, or a "
            "part of a context.",
            one_of(*KIND_OF_HEAD),
            group=DATA,
        ),
    )
    words_column: str = field(
        default="tokens", metadata=described("Column of the list of words, for token classification.", group=DATA)
    )
    tags_column: str = field(
        default="tags", metadata=described("Column of the list of tags, for token classification.", group=DATA)
    )
    question_column: str = field(
        default="question", metadata=described("Column of the question, for question answering.", group=DATA)
    )
    context_column: str = field(
        default="context", metadata=described("Column of the context, for question answering.", group=DATA)
    )
    answers_column: str = field(
        default="answers",
        metadata=described(
            "Column of the answers, for question answering: text, or text and answer_start as in SQuAD.", group=DATA
        ),
    )
    stride: int = field(
        default=STRIDE,
        metadata=described(
            "Tokens that two parts of a context have in common, if it is longer than --max-length allows.",
            NOT_NEGATIVE_INTEGER,
            group=DATA,
        ),
    )
    answer_tokens: int = field(
        default=ANSWER_TOKENS,
        metadata=described("Longest answer in tokens, for question answering.", POSITIVE_INTEGER, group=DATA),
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def given(self) -> list[str]:
        """The names of fields that have other values than their defaults."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(HeadOptions, name)]


def check_head(
    options: HeadOptions,
    task: TaskOptions,
    train_head: bool | None,
    *,
    deep: bool,
    task_column: str | None,
    several: bool,
) -> None:
    """Refuses options that cannot be combined with a head, or that need one.

    Args:
        several: whether an ensemble is tuned.

    Raises:
        ValueError: naming both options.
    """
    if options.head is None:
        given = [f"--{name.replace('_', '-')}" for name in options.given()]
        given += [] if train_head is None else ["--train-head" if train_head else "--freeze-head"]
        if given:
            raise ValueError(f"{given[0]} cannot be used without --head")
        return
    for name, flag in REFUSED.items():
        if getattr(task, name) != getattr(TaskOptions, name):
            raise ValueError(f"--head cannot be combined with {flag}")
    for flag, given_value in {"--deep": deep, "--task-column": task_column, "--members": several}.items():
        if given_value:
            raise ValueError(f"--head cannot be combined with {flag}")
    every = set().union(*COLUMNS.values())
    for name in sorted(every - COLUMNS[options.head]):
        owner: Any = options if hasattr(options, name) else task
        if getattr(owner, name) != getattr(type(owner), name):
            raise ValueError(f"--head {options.head} cannot be combined with --{name.replace('_', '-')}")


def head_task(options: HeadOptions, task: TaskOptions, rows: Examples, model: str, **fields: Any) -> Task:
    """The task on these rows, with the labels of the checkpoint's head if the rows have these."""
    from ..hf.head_loading import checkpoint_labels
    from ..tasks.head_tasks import answering_task, sequence_task, tagging_task
    from ..tasks.templates import unescaped

    assert options.head is not None
    fields |= {"max_length": task.max_length, "model": model}
    if options.head == ANSWERS:
        return answering_task(
            question_column=options.question_column,
            context_column=options.context_column,
            answers_column=options.answers_column,
            stride=options.stride,
            answer_tokens=options.answer_tokens,
            **fields,
        )
    fields["checkpoint_labels"] = checkpoint_labels(model, options.head)
    if options.head == TAGS:
        return tagging_task(rows, words_column=options.words_column, tags_column=options.tags_column, **fields)
    return sequence_task(
        rows,
        text_column=task.text_column,
        label_column=task.label_column,
        template=None if task.template is None else unescaped(task.template),
        **fields,
    )


def model_to_train(task: Task, train_head: bool | None, dtype: str, device: str | None) -> tuple[SoftPromptModel, Any]:
    """A model with the head of a task, trained or not, and its tokenizer.

    Raises:
        ValueError: ``train_head`` is False, but the checkpoint has no head with the labels of the task.
    """
    from ..hf.head_loading import checkpoint_labels, load_model_with_head
    from ..models.soft_prompt_model import SoftPromptModel
    from ..tasks.head import labels_of_checkpoint

    assert task.head is not None and task.model is not None
    own = checkpoint_labels(task.model, task.head.name)
    loaded = load_model_with_head(task.model, task.head.name, task.labels, dtype, device, console=console)
    other = own is None or (bool(task.labels) and labels_of_checkpoint(task.labels, own) is None)
    if (loaded.fresh or other) and train_head is False:
        raise ValueError(
            f"--freeze-head cannot be used because {task.model} has no head {task.head.name} "
            f"{'with the labels of the data' if task.labels and own is not None else 'of its own'}"
        )
    train = loaded.fresh or other if train_head is None else train_head
    why = "it is new" if loaded.fresh else "its labels are new" if other else "it is the checkpoint's"
    console.print(
        f"the head {task.head.name} is {'trained' if train else 'not trained'}: {why}", highlight=False, markup=False
    )
    return SoftPromptModel(loaded.model, train_head=train), loaded.tokenizer
