"""Observations: a few numbers about each row and its answer, without its text. Monitoring compares their distributions.

An observation describes the input (length, unknown or rare tokens, a projection of the mean token embedding) and the
output (answer, margin, entropy, agreement with the bare model). With a label it says whether the answer is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.modules import evaluating
from ..hf.embedding import vectors_like
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.containers import as_rows
from ..tasks.cuts import counting_cuts
from ..tasks.encoding import encode_targets, encode_text, label_words
from ..tasks.examples import Examples, has_target
from ..tasks.task import Task
from .likelihood import Ids, ModelBackend, Progress, batches, label_table, target_log_likelihoods
from .predictions import prompt_name

PROJECTIONS = 16
"""Numbers that stand for the mean embedding of a text's tokens."""
DIGITS = 6
"""Decimals that are kept, in a profile and in a log alike: rounding must not tell them apart."""
SIGNIFICANT = 5
"""Significant digits of projections, whose size depends on the model."""


@dataclass(frozen=True)
class Observation:
    """One row. A number that was not measured is None."""

    row: str
    """Digest of the text as the model reads it; equal texts have equal digests."""
    tokens: int
    """Tokens of the text, at most the task's ``max_length``."""
    embedding: tuple[float, ...]
    """[PROJECTIONS] fixed random projections of the mean embedding of the tokens."""
    new_tokens: float | None = None
    """Share of the tokens that are unknown to the tokenizer or that no (other) row of the reference has."""
    answer: str | None = None
    """Classification: the likeliest label."""
    margin: float | None = None
    """Probability of the likeliest answer minus that of the second. Answers are the labels; in a generation task, the
    first token of the response."""
    entropy: float | None = None
    """Entropy of the same distribution, in nats."""
    bare_agrees: bool | None = None
    """Whether the model without the prompt gives the same likeliest answer."""
    correct: bool | None = None
    """Whether the answer is the row's label; None: no label."""
    loss: float | None = None
    """Generation: negative log-probability of the response by its tokens; None: no response."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Observation:
        """The observation of a mapping, such as a line of a log; other keys are ignored.

        Raises:
            ValueError: a value is missing or of another type.
        """
        known = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        embedding = known.get("embedding")
        embedding = embedding if isinstance(embedding, list | tuple) else ()
        numbers = (*embedding, *(known.get(name, 0) for name in NUMBERS))
        if (
            not isinstance(known.get("row"), str)
            or not isinstance(known.get("tokens"), int)
            or len(embedding) != PROJECTIONS
            or not all(isinstance(number, int | float) and np.isfinite(number) for number in numbers)
            or not all(isinstance(known.get(name, True), bool) for name in ("correct", "bare_agrees"))
        ):
            raise ValueError("an observation must hold row, tokens and embedding, with finite numbers")
        return cls(**known | {"embedding": tuple(embedding)})


NUMBERS = ("new_tokens", "margin", "entropy", "loss")


class InputReader:
    """Reads the part of an observation that needs no forward pass.

    Args:
        embedding: the model's input embedding module.
        known: ids of the reference's tokens, see :attr:`Profile.known_tokens`; None: ``new_tokens`` is not measured.
    """

    def __init__(self, embedding: Any, tokenizer: Any, known: Collection[int] | None) -> None:
        self.embedding, self.tokenizer = embedding, tokenizer
        self.known = None if known is None else frozenset(known) - {tokenizer.unk_token_id}
        self._signs: Tensor | None = None

    def read(self, text: str, ids: Sequence[int]) -> Observation:
        """The observation of a text with its token ids."""
        new = None if self.known is None else sum(token not in self.known for token in ids) / len(ids)
        return Observation(
            hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            len(ids),
            self._project(ids),
            None if new is None else round(new, DIGITS),
        )

    @torch.no_grad()
    def _project(self, ids: Sequence[int]) -> tuple[float, ...]:
        device = vectors_like(self.embedding).device
        mean = self.embedding(torch.tensor(ids, device=device)).double().mean(0).cpu()
        if self._signs is None:
            self._signs = _signs(len(mean))
        return tuple(float(f"{value:.{SIGNIFICANT}g}") for value in (self._signs @ mean).tolist())


def _signs(width: int) -> Tensor:
    """[PROJECTIONS, width] of plus and minus one, from a hash: the same with any version of any library."""
    count = PROJECTIONS * width
    data = hashlib.shake_128(b"projections of monitoring").digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1).reshape(PROJECTIONS, width) / width**0.5


def answered(seen: Observation, scores: Mapping[str, float], label: str | None = None) -> Observation:
    """The observation with a classification's answer.

    Args:
        scores: probability of each label among the labels.
        label: the right one, if it is known.
    """
    answer = max(scores, key=scores.__getitem__)
    margin, entropy = _shape(torch.tensor([list(scores.values())], dtype=torch.float64).log())
    return replace(
        seen,
        answer=answer,
        margin=round(margin[0], DIGITS),
        entropy=round(entropy[0], DIGITS),
        correct=None if label is None else answer == label,
    )


@torch.no_grad()
def observe(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    *,
    prompt: str | None = None,
    known: Collection[int] | None = None,
    bare: bool = True,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Observation]:
    """Observes rows: one forward pass, one without the prompt, and one for the responses of a generation task.

    Args:
        rows: each has text. Labels and responses are optional.
        prompt: name of the prompt; None: the task's.
        known: ids of the reference's tokens (:attr:`Profile.known_tokens`).
        bare: also run the model without the prompt.
        progress: called with the number of forward passes of rows done since its last call.

    Raises:
        ValueError: no text in a row, or a value that is not one label. A label that the task does not know counts as
            none.
    """
    rows = as_rows(rows)
    backend = ModelBackend(model, prompt_name(model, task, prompt))
    encoder_decoder = backend.encoder_decoder
    reader = InputReader(model.get_input_embeddings(), tokenizer, known)
    with counting_cuts():
        texts = [encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
    targets = [i for i, row in enumerate(rows) if has_target(task, row)]
    seen = [reader.read(task.text(row), ids) for row, ids in zip(rows, texts, strict=True)]
    with evaluating(model):
        answers = _answers(backend, tokenizer, task, texts, batch_size, progress)
        found = [
            replace(one, margin=round(margin, DIGITS), entropy=round(entropy, DIGITS))
            for one, margin, entropy in zip(seen, *answers.shape, strict=True)
        ]
        if task.kind == "classification":
            found = [replace(one, answer=task.labels[best]) for one, best in zip(found, answers.best, strict=True)]
            for i in targets:
                found[i] = replace(found[i], correct=found[i].answer == task.label(rows[i]))
        else:
            for i, loss in _response_losses(backend, tokenizer, task, rows, texts, targets, batch_size, progress):
                found[i] = replace(found[i], loss=round(loss, DIGITS))
        if bare:
            # A prompt that holds BOS is tuned without the tokenizer's own; the bare model needs that.
            plain = replace(task, special_tokens=True)
            with counting_cuts(log=False):
                texts = [encode_text(plain, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
            backend = ModelBackend(SoftPromptModel(model.base_model))
            best = _answers(backend, tokenizer, plain, texts, batch_size, progress).best
            found = [
                replace(one, bare_agrees=own == other)
                for one, own, other in zip(found, answers.best, best, strict=True)
            ]
    return found


@dataclass
class _Answers:
    best: list[int]
    """[rows] the likeliest label, or the likeliest first token."""
    shape: tuple[list[float], list[float]]
    """Margins and entropies, [rows] each."""


def _answers(
    backend: ModelBackend, tokenizer: Any, task: Task, texts: Ids, batch_size: int, progress: Progress | None
) -> _Answers:
    if task.kind == "classification":
        words = label_words(task, tokenizer, encoder_decoder=backend.encoder_decoder)
        table = label_table(backend, texts, words, batch_size, progress)
        return _Answers(table.argmax(-1).tolist(), _shape(table))
    best, margins, entropies = [0] * len(texts), [0.0] * len(texts), [0.0] * len(texts)
    for indices in batches([len(text) for text in texts], batch_size, progress):
        table = backend.next_logits([texts[i] for i in indices]).double().log_softmax(-1).cpu()
        for i, token, margin, entropy in zip(indices, table.argmax(-1).tolist(), *_shape(table), strict=True):
            best[i], margins[i], entropies[i] = token, margin, entropy
    return _Answers(best, (margins, entropies))


def _shape(table: Tensor) -> tuple[list[float], list[float]]:
    """Margin and entropy of each distribution of [rows, C] log-probabilities."""
    first, second = table.topk(2, -1).values.exp().unbind(-1)
    return (first - second).tolist(), torch.special.entr(table.exp()).sum(-1).tolist()


def _response_losses(
    backend: ModelBackend,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    texts: Ids,
    targets: Sequence[int],
    batch_size: int,
    progress: Progress | None,
) -> list[tuple[int, float]]:
    """The index of each row with a response, and the response's loss by its tokens."""
    if not targets:
        return []
    chosen = [rows[i] for i in targets]
    with counting_cuts(log=False):
        responses = encode_targets(task, chosen, tokenizer, encoder_decoder=backend.encoder_decoder)
    losses = []
    lengths = [len(texts[i]) + len(response) for i, response in zip(targets, responses, strict=True)]
    for indices in batches(lengths, batch_size, progress):
        some, following = [texts[targets[i]] for i in indices], [responses[i] for i in indices]
        values = target_log_likelihoods(backend, some, following).tolist()
        losses += [(targets[i], -v / len(responses[i])) for i, v in zip(indices, values, strict=True)]
    return losses
