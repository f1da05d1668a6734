"""Row-by-row scores of a method by its backend."""

from __future__ import annotations

from ..evaluation import likelihood
from ..evaluation.likelihood import Backend
from ..evaluation.scores import RowScores
from ..tasks.examples import Examples
from .encoding import Encoder


def score_rows(backend: Backend, encoder: Encoder, rows: Examples, batch_size: int) -> RowScores:
    """Scores of labelled rows, in their order; classification compares the label words' log-probabilities."""
    encoded = likelihood.encode_rows(encoder.task, rows, encoder.tokenizer, texts=encoder.texts(rows))
    return likelihood.score_rows(backend, encoded, batch_size)
