"""What a student says when it continues queries freely, compared with what the teacher says."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation.overlap import rouge_l
from .retention import Contestant, Retention
from .settings import DistillationSettings
from .teacher import Target, Teacher

logger = logging.getLogger("softprompt_fast")

Scorer = Callable[[list[str], list[str]], float]
"""Gives the texts of a student a score: the teacher's texts and the student's, in the same order."""


def check_scorer(scorer: Any, settings: DistillationSettings) -> None:
    """Raises TypeError or ValueError if a scorer cannot be used."""
    if scorer is None:
        return
    if not callable(scorer):
        raise TypeError(f"`scorer` must be a function of two lists of texts, got {scorer!r}")
    if not settings.free_continuations:
        raise ValueError("`scorer` cannot be combined with `free_continuations` 0: there are no texts to score")


@dataclass(frozen=True)
class FreeContinuations:
    """The teacher's greedy texts after some of the held-out queries."""

    teacher: Teacher
    queries: list[list[int]]
    """Token ids [T] of each."""
    texts: list[str]
    """What the teacher says after each query."""
    scorer: Scorer | None = None

    def whole(self, retention: Retention) -> Retention:
        """The retention of the whole text, with the scores of the teacher's own texts.

        Raises:
            TypeError, ValueError: the scorer returns no finite number.
        """
        return self._compared(retention, self.texts, self._scores(self.texts))

    def of(self, contestant: Contestant, retention: Retention) -> Retention:
        """The retention of a contestant, with the scores of what it says.

        Training is over by now, so an error of the scorer is a warning, and its score is left out.
        """
        settings, texts = self.teacher.settings, list[str]()
        for start in range(0, len(self.queries), settings.batch_size):
            batch = self.queries[start : start + settings.batch_size]
            speaker = (contestant.model, [contestant.prompt] * len(batch))
            answers = self.teacher.generate(batch, speaker=speaker, max_new_tokens=settings.new_tokens)
            texts += _decoded(self.teacher, answers)
        scores = dict[str, float]()
        try:
            scores = self._scores(texts)
        except Exception as error:
            logger.warning("`scorer` gives no score of %s (%d tokens): %r", contestant.label, contestant.tokens, error)
        return self._compared(retention, texts, scores)

    def _scores(self, texts: list[str]) -> dict[str, float]:
        return {} if self.scorer is None else {name_of(self.scorer): _score(self.scorer, self.texts, texts)}

    def _compared(self, retention: Retention, texts: list[str], scores: dict[str, float]) -> Retention:
        if not texts:
            return retention
        pairs = list(zip(self.texts, texts, strict=True))
        return replace(
            retention,
            rouge_l=sum(rouge_l(expected, got) for expected, got in pairs) / len(pairs),
            same_text=sum(expected == got for expected, got in pairs) / len(pairs),
            scores=scores,
        )


def free_continuations(
    teacher: Teacher, targets: Sequence[Target], settings: DistillationSettings, scorer: Scorer | None = None
) -> FreeContinuations:
    """The teacher's texts after at most ``settings.free_continuations`` queries, spread evenly over the targets.

    They are read from the targets if these are greedy.
    """
    count = min(settings.free_continuations, len(targets))
    chosen = [targets[i * len(targets) // count] for i in range(count)]
    queries = [target.query for target in chosen]
    answers = [target.continuation for target in chosen]
    if settings.continuation != "greedy":
        answers = []
        for start in range(0, count, settings.batch_size):
            batch = queries[start : start + settings.batch_size]
            answers += teacher.generate(batch, max_new_tokens=settings.new_tokens)
    return FreeContinuations(teacher, queries, _decoded(teacher, answers), scorer)


def name_of(scorer: Scorer) -> str:
    """The name under which a scorer is reported: that of the function or of its class."""
    return getattr(scorer, "__name__", None) or type(scorer).__name__


def _score(scorer: Scorer, expected: list[str], texts: list[str]) -> float:
    found = scorer(list(expected), list(texts))
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`scorer` must return a number, got {found!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"`scorer` must return a finite number, got {value}")
    return value


def _decoded(teacher: Teacher, answers: Sequence[list[int]]) -> list[str]:
    return [teacher.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
