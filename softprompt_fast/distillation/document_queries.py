"""Queries that are about one of several documents, and the documents that stand in front of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hf.architecture import context_length
from ..tasks.containers import as_rows
from ..tasks.examples import Examples
from ..tasks.rows import joined
from ..tasks.task import Task
from .arrangements import Arrangement, Documents, Teachers, beside_others
from .preparation import check_held_out, check_room, check_room_to_ask, not_held_out, split_queries
from .queries import check_one_column, encoded, make_queries, usable_queries
from .settings import DistillationSettings


@dataclass(frozen=True)
class DocumentQueries:
    """Reads queries about documents."""

    base: Any
    tokenizer: Any
    read: Documents
    task: Task
    column: str
    """Holds the name of a query's document."""
    settings: DistillationSettings

    def known(self, rows: Any, argument: str = "queries") -> Examples:
        """The queries with text, each once, out of any container of rows.

        Raises:
            ValueError: one names no document.
        """
        rows = as_rows(rows, argument)
        usable = usable_queries(self.task, rows, self.column) if rows else []
        for row in usable:
            if row.get(self.column) not in self.read.pieces:
                names = ", ".join(self.read.names)
                raise ValueError(f"column {self.column!r} must be one of {names}, got {row.get(self.column)!r}")
        return usable

    def made(self, teachers: Teachers, count: int) -> Examples:
        """Queries that the model makes from each document."""
        made: Examples = []
        for name in self.read.names if count else ():
            source = replace(self.read.source, ids=self.read.ids((name,)))
            check_room_to_ask(self.base, self.tokenizer, source)
            rows = make_queries(teachers[(name,)], source, self.task, count, seed=self.settings.seed)
            made += [row | {self.column: name} for row in rows]
        return made

    def check_split(self, held_out: Any, given: int, made: int) -> None:
        """Checks before the model makes queries what can be known of them.

        Args:
            given: number of given queries.
            made: number of queries that the model shall make from each document.
        """
        if made:
            check_one_column(self.task)
            if self.column in self.task.columns:
                raise ValueError(f"`document_column` must not be the column of self-made queries, got {self.column!r}")
        check_held_out(held_out, given + made * len(self.read.names))

    def split(
        self, given: Examples, made: Examples, held_out: float | Sequence[Mapping[str, Any]]
    ) -> tuple[Examples, Examples]:
        """Queries to train on, some about each document, and those that are held out."""
        rows = usable_queries(self.task, joined(given, made), self.column) if made else given
        train, test = split_queries(self.task, rows, held_out, self.settings.seed, self.column)
        own, held = (list(zip(some, self.alone(some), strict=True)) for some in (train, test))
        train = [row for row, _ in not_held_out(own, held, lambda query: str(query[1]))]
        if missing := set(self.read.names) - {row[self.column] for row in train}:
            raise ValueError(
                f"`queries` must hold some to train on about each document, got none about {min(missing)!r}"
            )
        return train, test

    def alone(self, rows: Examples) -> list[tuple[Arrangement, list[int]]]:
        """Each query's token ids [T] after its document alone."""
        ids = encoded(self.task, rows, self.tokenizer)
        return [((row[self.column],), query) for row, query in zip(rows, ids, strict=True)]

    def beside(self, rows: Examples, count: int, seed: int) -> list[tuple[Arrangement, list[int]]]:
        """The same with `count` other documents."""
        draw = random.Random(seed)
        return [
            (beside_others(self.read.names, document, count, draw), query) for (document,), query in self.alone(rows)
        ]

    def check_room(self, rows: Examples, beside: int) -> None:
        """Raises ValueError if the longest documents and query do not fit into the model's context."""
        check_room(self.base, self._longest(beside), self._lengths(rows), self.settings.new_tokens)

    def most_beside(self, rows: Examples, beside: int) -> int:
        """How many other documents are measured: as in training, else one, or none if two documents do not fit."""
        limit, needed = context_length(self.base), self._longest(1) + max(self._lengths(rows), default=1)
        fit = limit is None or needed + self.settings.new_tokens <= limit
        return beside or int(fit)

    def _lengths(self, rows: Examples) -> list[int]:
        return [len(query) for _, query in self.alone(rows)]

    def _longest(self, beside: int) -> int:
        """Tokens of the longest documents that can stand together."""
        lengths = sorted((len(ids) for ids in self.read.pieces.values()), reverse=True)
        return len(self.read.opening) + sum(lengths[: beside + 1])
