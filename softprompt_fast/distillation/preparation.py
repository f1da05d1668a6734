"""Checks the arguments of a compression, and prepares its text, its queries and its teacher."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from rich.console import Console

from ..base.files import check_folder
from ..base.locations import located
from ..base.progress import progress_bar
from ..hf.architecture import context_length, is_causal
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..ops.extension.build import cache_directory
from ..prompts.base_identity import check_base
from ..prompts.fast_soft_prompt import check_name
from ..prompts.peft_files import is_prompt_folder
from ..prompts.run_files import RETENTION_FILE
from ..tasks.containers import as_rows
from ..tasks.cuts import counting_cuts
from ..tasks.examples import Examples, split_rows
from ..tasks.rows import choose, joined
from ..tasks.task import Task, generation_task
from ..tasks.templates import columns, field
from .fitting import check_fitting
from .queries import (
    LONGEST,
    QUERIES_FILE,
    check_one_column,
    encoded,
    make_queries,
    query_starts,
    usable_queries,
    write_queries,
)
from .settings import FITTED, INITS, DistillationSettings
from .source_text import SourceText, read_source
from .teacher import Teacher

Query = TypeVar("Query")
logger = logging.getLogger("softprompt_fast")

ANSWER_COLUMNS = ("response", "answer", "continuation")
"""Names of the column of answers; the first that the template does not use."""


@dataclass(frozen=True)
class Prepared:
    """What the teacher, the training and the report read."""

    base: Any
    source: SourceText
    task: Task
    teacher: Teacher
    student: SoftPromptModel
    """Has the prompt already if `init` is a folder."""
    names: dict[int, str]
    """The prompt's name for each number of tokens, in ascending order."""
    train: list[list[int]]
    """Token ids [T] of the queries to train on."""
    held_out: list[list[int]]
    self_made: Examples
    """Queries that the model made."""
    query_seconds: float
    """What making them took."""
    output: Path
    settings: DistillationSettings
    console: Console


def prepare(
    base: Any,
    tokenizer: Any,
    text: str,
    output: Path,
    queries: Sequence[Mapping[str, Any]],
    *,
    tokens: int | Sequence[int],
    self_queries: int,
    text_column: str,
    template: str | None,
    chat: bool,
    held_out: float | Sequence[Mapping[str, Any]],
    name: str,
    base_name: str | None,
    max_drop: float,
    cache: Path | None,
    settings: DistillationSettings,
    console: Console,
) -> Prepared:
    """Arguments as in :func:`~.run.compress`. Nothing is written but queries that the model makes."""
    names = prompt_names(name, tokens, settings)
    queries = as_rows(queries, "queries")
    check_queries(queries, self_queries)
    if not 0 <= max_drop < math.inf:
        raise ValueError(f"`max_drop` must be 0 or more and finite, got {max_drop}")
    check_model(base)
    check_new_files(output, [*names.values(), RETENTION_FILE], self_queries)
    check_folder(cache_folder(cache), "`cache`")
    source = read_source(tokenizer, text, field(text_column) if template is None else template, chat=chat)
    if max(names) >= len(source):
        raise ValueError(f"`tokens` must be below the text's {len(source)} tokens, got {max(names)}")
    task = replace(task_of(base, source.template, settings, base_name), prompt=name)
    given = usable_queries(task, queries) if queries else []
    check_held_out(held_out, len(given) + self_queries)
    known = given if is_number(held_out) else joined(given, usable_queries(task, as_rows(held_out, "held_out")))
    check_room(base, len(source), [len(ids) for ids in encoded(task, known, tokenizer)], settings.new_tokens)
    student = _student(base, names, settings)
    teacher = Teacher(base, tokenizer, source.ids, settings, cache_folder(cache))
    self_made: Examples = []
    start = time.perf_counter()
    if self_queries:
        check_one_column(task)
        check_room_to_ask(base, tokenizer, source)
        console.print(f"the model makes {self_queries} queries from the text", highlight=False)
        with progress_bar(self_queries, console) as advance:
            self_made = make_queries(teacher, source, task, self_queries, seed=settings.seed, progress=advance)
        write_queries(self_made, output)
    query_seconds = time.perf_counter() - start
    rows = usable_queries(task, joined(given, self_made)) if self_made else given
    train, test = split_queries(task, rows, held_out, settings.seed)
    with counting_cuts():
        train_ids, test_ids = encoded(task, train, tokenizer), encoded(task, test, tokenizer)
    train_ids = not_held_out(train_ids, test_ids, tuple)
    check_room(base, len(source), [len(ids) for ids in train_ids + test_ids], settings.new_tokens)
    return Prepared(
        base,
        source,
        task,
        teacher,
        student,
        names,
        train_ids,
        test_ids,
        self_made,
        query_seconds,
        output,
        settings,
        console,
    )


def task_of(base: Any, template: str, settings: DistillationSettings, base_name: str | None) -> Task:
    """The task of a compressed text: queries as the template renders them, and a column of answers."""
    used = columns(template)
    return generation_task(
        output_column=next((column for column in ANSWER_COLUMNS if column not in used), "_".join(used)),
        template=template,
        max_length=settings.max_length,
        model=base_name or getattr(base, "name_or_path", None) or None,
        special_tokens=False,
        literal=True,
    )


def cache_folder(cache: PathLike[str] | str | None) -> Path:
    """Where the teacher's answers are kept."""
    return cache_directory() / "distillation" if cache is None else Path(cache)


def new_student(base: Any, settings: DistillationSettings) -> SoftPromptModel:
    """A model without prompts.

    Raises:
        TypeError: the model cannot run keys and values.
    """
    return (DeepPromptModel if settings.form == "kv" else SoftPromptModel)(base)


def prompt_names(name: str, tokens: int | Sequence[int], settings: DistillationSettings) -> dict[int, str]:
    """The prompt's name for each number of tokens, in ascending order.

    Raises:
        ValueError: a name or a number that is not allowed.
    """
    check_name(name)
    counts = list(tokens) if isinstance(tokens, Sequence) else [tokens]
    counts = [check_count(count, settings) for count in counts]
    if not counts:
        raise ValueError("`tokens` must name at least one number, got none")
    names = {count: f"{name}-{count}" for count in sorted(set(counts))} if len(counts) > 1 else {counts[0]: name}
    for each in names.values():
        check_name(each)
    return names


def check_count(count: Any, settings: DistillationSettings) -> int:
    """A number of tokens. Raises ValueError if `count` is none that can be trained."""
    least = 2 if settings.keep_first else 1
    if not isinstance(count, Integral) or isinstance(count, bool) or count < least:
        why = " because the first position is not trained (`keep_first`)" if least == 2 and count == 1 else ""
        raise ValueError(f"`tokens` must be integers of at least {least}{why}, got {count!r}")
    return int(count)


def check_queries(queries: Sequence[Any] | None, self_queries: int) -> None:
    """Raises ValueError if there are no queries."""
    if not isinstance(self_queries, Integral) or self_queries < 0:
        raise ValueError(f"`self_queries` must be an integer from 0, got {self_queries}")
    if not queries and not self_queries:
        raise ValueError(
            "there are no queries: give `queries` (--queries), or let the model make some with `self_queries` "
            "(--self-queries)"
        )


def check_new_files(output: Path, names: Sequence[str], self_queries: int) -> None:
    """Raises OSError if the output folder cannot be written to, or holds something that would be replaced."""
    check_folder(output, "`output`")
    for name in names:
        if (output / name).exists():
            raise FileExistsError(f"{output / name} already exists; choose another output folder")
    if self_queries and (output / QUERIES_FILE).exists():
        raise FileExistsError(
            f"{output / QUERIES_FILE} already exists; choose another output folder, or give this file as queries "
            "instead of self-made ones"
        )


def check_held_out(held_out: Any, count: int) -> None:
    """Raises ValueError if a share or number leaves none of at most `count` queries on one side."""
    if not is_number(held_out):
        return
    kept = held_out if held_out >= 1 else round(count * held_out) if held_out > 0 else 0
    if isinstance(held_out, bool) or not 0 < kept < count or kept % 1:
        raise ValueError(
            f"`held_out` must be a share below 1 or a whole number that leaves some of {count} queries on both sides, "
            f"got {held_out}"
        )


def is_number(held_out: Any) -> TypeGuard[float]:
    """Whether a share or a number of queries is held out, and not rows of their own."""
    return isinstance(held_out, Real)


def not_held_out(train: list[Query], test: list[Query], key: Callable[[Query], Hashable]) -> list[Query]:
    """The queries to train on, without those that have the key of a held-out one.

    Raises:
        ValueError: none is left.
    """
    held = set(map(key, test))
    kept = [query for query in train if key(query) not in held]
    if not kept:
        raise ValueError(f"`queries` must hold some that are not held out, got {len(train)}, all of them in `held_out`")
    if len(kept) < len(train):
        logger.warning("%d queries have the tokens of held-out ones and are left out", len(train) - len(kept))
    return kept


def split_queries(
    task: Task,
    rows: Examples,
    held_out: float | Sequence[Mapping[str, Any]],
    seed: int,
    about: str | None = None,
) -> tuple[Examples, Examples]:
    """The queries to train on and those that measure retention; none is on both sides.

    Args:
        about: as for :func:`~.queries.usable_queries`.
    """
    if is_number(held_out):
        return split_rows(rows, float(held_out), seed)

    def key(row: Mapping[str, Any]) -> tuple[Any, str]:
        return None if about is None else row.get(about), task.text(row)

    test = usable_queries(task, as_rows(held_out, "held_out"), about)
    known = {key(row) for row in test}
    train = choose(rows, [i for i, row in enumerate(rows) if key(row) not in known])
    if not train:
        raise ValueError(f"`queries` must hold some that are not held out, got {len(rows)}, all of them in `held_out`")
    return train, test


def check_model(base: Any) -> None:
    if not is_causal(base) or not getattr(base, "can_generate", lambda: False)():
        raise TypeError(
            f"{type(base).__name__} cannot continue queries, so it cannot be a teacher; `model` must be a decoder with "
            "a language-modelling head"
        )


def _student(base: Any, names: dict[int, str], settings: DistillationSettings) -> SoftPromptModel:
    """A model for the prompts, with the one that `init` names.

    Raises:
        TypeError: the model cannot run keys and values, or `init` fits none to its attention.
        ValueError: `init` is a prompt of another shape.
    """
    student = new_student(base, settings)
    if isinstance(student, DeepPromptModel) and settings.init == FITTED:
        check_fitting(student)
    if settings.init not in ("auto", *INITS):
        if len(names) > 1:
            raise ValueError(f"`init` must be {', '.join(('auto', *INITS))} for several `tokens`, got {settings.init}")
        folder = located(settings.init)
        if not is_prompt_folder(folder) and not folder.is_file():
            choices = ", ".join(("auto", *INITS))
            raise ValueError(f"`init` must be {choices} or the folder or file of a prompt, got {str(settings.init)!r}")
        check_base(folder, base)
        ((count, name),) = names.items()
        found = len(student.add_prompt(name, init=folder))
        if found != count:
            raise ValueError(f"`init` must have as many positions as `tokens`, {count}, got {found}")
    return student


def check_room(base: Any, text: int, queries: Sequence[int], new_tokens: int) -> None:
    """Refuses a text that does not fit into the model's context with the longest query and its continuation."""
    limit, longest = context_length(base), max(queries, default=1)
    more = 0 if limit is None else text + longest + new_tokens - limit
    if more > 0:
        raise ValueError(
            f"the text must fit into the model's context of {limit} tokens with the longest query ({longest}) and its "
            f"continuation ({new_tokens}), got {text} tokens, {more} too many"
        )


def check_room_to_ask(base: Any, tokenizer: Any, source: SourceText) -> None:
    """Raises ValueError if the text and a query that the model makes do not fit into its context."""
    starts, parts = query_starts(tokenizer, source)
    asked = [len(ids) for openings in starts.values() for _, ids in openings]
    check_room(base, max(len(source), *map(len, parts)), asked, LONGEST)
