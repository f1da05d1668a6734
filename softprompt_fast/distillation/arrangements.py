"""Documents in front of a query: which ones, in which order, and a teacher for each arrangement."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import check_name
from .settings import DistillationSettings
from .source_text import SourceText, read_source
from .teacher import Target, Teacher, add_text, model_identity

OPENING = "opening"
"""Name of the prompt before all documents: BOS, or the opening of a chat."""
Arrangement = tuple[str, ...]
"""Names of documents in the order in which they stand in front of a query."""


@dataclass(frozen=True)
class Documents:
    """The documents as token ids."""

    opening: list[int]
    """[O], in front of every arrangement; often empty."""
    pieces: dict[str, list[int]]
    """[T] of each document, with the empty line after it."""
    source: SourceText
    """The first document alone: it says how a query follows."""

    @property
    def names(self) -> list[str]:
        return list(self.pieces)

    def ids(self, arrangement: Arrangement) -> list[int]:
        """[T], what the teacher reads before a query."""
        return self.opening + [token for name in arrangement for token in self.pieces[name]]

    def front(self, arrangement: Arrangement) -> tuple[str, ...]:
        """The student's prompts for an arrangement."""
        return (OPENING, *arrangement) if self.opening else arrangement


def read_documents(tokenizer: Any, documents: Mapping[str, str], template: str, *, chat: bool) -> Documents:
    """Documents as the model reads them.

    Raises:
        ValueError: fewer than two, a name that is not allowed, or an empty text.
    """
    if len(documents) < 2:
        raise ValueError(
            f"`documents` must hold at least two texts, got {len(documents)}; compress one with `compress`"
        )
    for name in documents:
        check_name(name)
        if name == OPENING:
            raise ValueError(f"`documents` must not be named {OPENING!r}, which is the name of what stands before them")
    # An empty line ends each document, so that their token ids do not depend on what follows.
    sources = {
        name: read_source(tokenizer, f"{text.rstrip()}\n\n" if isinstance(text, str) else text, template, chat=chat)
        for name, text in documents.items()
    }
    frame = min(source.frame for source in sources.values())
    first = next(iter(sources.values()))
    return Documents(first.ids[:frame], {name: source.ids[frame:] for name, source in sources.items()}, first)


def beside_others(names: Sequence[str], document: str, count: int, draw: random.Random) -> Arrangement:
    """A document with `count` others, in any order."""
    chosen = [document, *draw.sample([name for name in names if name != document], count)]
    draw.shuffle(chosen)
    return tuple(chosen)


class Teachers:
    """A teacher for each arrangement. All share the cache and one model, in which each document is a prompt."""

    def __init__(
        self, model: Any, tokenizer: Any, documents: Documents, settings: DistillationSettings, cache: Path | None
    ) -> None:
        self.model = SoftPromptModel(model)
        for name, ids in documents.pieces.items():
            add_text(self.model, name, ids)
        if documents.opening:
            add_text(self.model, OPENING, documents.opening)
        self._of = (model, tokenizer, settings, cache)
        self._identity = model_identity(model)
        self._documents = documents
        self._known: dict[Arrangement, Teacher] = {}

    def __getitem__(self, arrangement: Arrangement) -> Teacher:
        if arrangement not in self._known:
            model, tokenizer, settings, cache = self._of
            ids, front = self._documents.ids(arrangement), self._documents.front(arrangement)
            parts = (self.model, front)
            self._known[arrangement] = Teacher(model, tokenizer, ids, settings, cache, parts, self._identity)
        return self._known[arrangement]

    def targets(
        self, queries: Iterable[tuple[Arrangement, list[int]]], progress: Callable[[int], None] | None = None
    ) -> dict[Arrangement, list[Target]]:
        """The teachers' answers to queries [T], by their arrangement; within one, in the order of the queries."""
        asked: dict[Arrangement, list[list[int]]] = defaultdict(list)
        for arrangement, ids in queries:
            asked[arrangement].append(ids)
        return {
            arrangement: [
                replace(target, front=self._documents.front(arrangement))
                for target in self[arrangement].targets(some, progress)
            ]
            for arrangement, some in asked.items()
        }
