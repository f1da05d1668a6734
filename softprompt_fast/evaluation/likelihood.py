"""How likely a model says labels and responses: one scorer, for any backend that computes logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import FastSoftPrompt, PromptIds
from ..tasks.collation import length_order, padded
from ..tasks.cuts import counting_cuts
from ..tasks.encoding import IGNORED, encode_targets, encode_text, label_words
from ..tasks.examples import check_complete
from ..tasks.label_tree import LabelTree
from ..tasks.task import Task
from .scores import RowScores

Ids = Sequence[Sequence[int]]
"""Token ids of several rows."""
Progress = Callable[[int], None]
"""Called with the number of rows done since its last call."""
CHUNK = 256
"""Rows of logits that are computed in float64 at a time; bounds memory."""


class Backend(Protocol):
    """Computes logits after texts, which are given as token ids."""

    def next_logits(self, texts: Ids) -> Tensor:
        """[B, V], of the token after each text."""

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        """[M, V], row by row for all M target tokens: each after the text and the target tokens before it."""


class ModelBackend:
    """Logits of a :class:`SoftPromptModel`; of encoder-decoders, those of the decoder.

    Args:
        prompt_ids: the rows' prompts, as in :meth:`SoftPromptModel.forward`; a list has an entry for each text.
        prompts: the bank they are in; None: the model's own.
    """

    def __init__(
        self, model: SoftPromptModel, prompt_ids: PromptIds = None, prompts: FastSoftPrompt | None = None
    ) -> None:
        self.model, self.prompt_ids, self.prompts = model, prompt_ids, prompts
        self.encoder_decoder = is_encoder_decoder(model.base_model)

    def next_logits(self, texts: Ids) -> Tensor:
        if self.encoder_decoder:
            return self.target_logits(texts, [[0]] * len(texts))  # a decoder's first step reads no target
        return self.model.next_token_logits(*padded(texts, self.model.device), self.prompt_ids, prompts=self.prompts)

    def target_logits(self, texts: Ids, targets: Ids) -> Tensor:
        if self.encoder_decoder:
            return self._decoder_logits(texts, targets)
        ids, mask = padded(joined(texts, targets), self.model.device)
        at = torch.tensor(target_places(texts, targets), device=self.model.device)
        return self.model.logits_at(ids, mask, self.prompt_ids, at, prompts=self.prompts)

    def _decoder_logits(self, texts: Ids, targets: Ids) -> Tensor:
        ids, mask = padded(texts, self.model.device)
        labels, real = padded(targets, self.model.device, value=IGNORED)
        output = self.model(ids, mask, labels, self.prompt_ids, prompts=self.prompts, return_logits=True)
        logits: Tensor = output.logits[real.bool()]
        return logits


def joined(texts: Ids, targets: Ids) -> list[list[int]]:
    """What a decoder reads: the last target token is predicted, not read."""
    return [[*text, *target[:-1]] for text, target in zip(texts, targets, strict=True)]


def target_places(texts: Ids, targets: Ids) -> list[list[int]]:
    """[M, 2], row and column of the token before each target token."""
    pairs = enumerate(zip(texts, targets, strict=True))
    return [[row, len(text) + step - 1] for row, (text, target) in pairs for step in range(len(target))]


@torch.no_grad()
def log_probabilities(logits: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """[N], log-probability of each token in the distribution ``logits[row]`` of [M, V]; float64, on the host."""
    norms = torch.cat([part.double().logsumexp(-1) for part in logits.split(CHUNK)])
    at = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    return (logits[at, ids].double() - norms[at]).cpu()


@torch.no_grad()
def target_log_likelihoods(backend: Backend, texts: Ids, targets: Ids) -> Tensor:
    """[B], log-probability of each text's whole target, summed over its tokens; float64, on the host."""
    tokens = [token for target in targets for token in target]
    rows = torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.int64)
    each = log_probabilities(backend.target_logits(texts, targets), range(len(tokens)), tokens)
    return torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, each)


@torch.no_grad()
def label_log_probabilities(backend: Backend, texts: Ids, words: Ids) -> Tensor:
    """[B, C], log-probability of each label among the labels, by their words; float64, on the host.

    See :class:`LabelTree`.
    """
    tree = LabelTree(words)
    values = {}
    for path in tree.paths:
        targets = [[*path, 0]] * len(texts)  # the last token is predicted, not read
        logits = backend.target_logits(texts, targets) if path else backend.next_logits(texts)
        logits = logits.view(len(texts), len(path) + 1, -1)
        for prefix in tree.branches_on(path):
            values[prefix] = logits[:, len(prefix), tree.branches[prefix]].double().cpu()
    return tree.scores(values, len(texts)).log_softmax(-1)


@dataclass
class EncodedRows:
    """Labelled rows of a task as token ids."""

    texts: list[list[int]]
    targets: list[list[int]]
    """The responses; empty for a classification task."""
    words: list[list[int]]
    """Each label's word, with its end token if it has one; empty for a generation task."""
    truth: Tensor | None
    """[rows] place of each row's label among the task's; None: a generation task."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, its response included."""
        if self.truth is not None:
            return [len(text) for text in self.texts]
        return [len(text) + len(target) for text, target in zip(self.texts, self.targets, strict=True)]

    @property
    def weights(self) -> Tensor:
        """[rows] of a generation task: tokens of each response."""
        return torch.tensor([len(target) for target in self.targets], dtype=torch.float64)


def encode_rows(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    encoder_decoder: bool = False,
    texts: list[list[int]] | None = None,
) -> EncodedRows:
    """Encodes labelled rows.

    Args:
        texts: token ids that replace the rows' own texts.

    Raises:
        ValueError: no rows, a row without text or target, or a label that the task does not know.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none")
    check_complete(task, rows, "rows")
    with counting_cuts():
        if texts is None:
            texts = [encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
        if task.kind == "generation":
            targets = encode_targets(task, rows, tokenizer, encoder_decoder=encoder_decoder)
            return EncodedRows(texts, targets, [], None)
    truth = torch.tensor([task.labels.index(task.label(row)) for row in rows])
    return EncodedRows(texts, [], label_words(task, tokenizer, encoder_decoder=encoder_decoder), truth)


def batches(lengths: Sequence[int], batch_size: int, progress: Progress | None) -> Iterator[list[int]]:
    """Row indices by length, longest first; reports each batch when the caller asks for the next one."""
    for indices in length_order(lengths, batch_size):
        yield indices
        if progress is not None:
            progress(len(indices))


def label_table(backend: Backend, texts: Ids, words: Ids, batch_size: int, progress: Progress | None = None) -> Tensor:
    """[rows, C], log-probability of each label among the labels for all rows; float64, on the host."""
    table = torch.zeros(len(texts), len(words), dtype=torch.float64)
    for indices in batches([len(text) for text in texts], batch_size, progress):
        table[indices] = label_log_probabilities(backend, [texts[i] for i in indices], words)
    return table


def score_rows(backend: Backend, rows: EncodedRows, batch_size: int, progress: Progress | None = None) -> RowScores:
    """Scores of labelled rows, in their order."""
    if rows.truth is not None:
        return RowScores.of_labels(label_table(backend, rows.texts, rows.words, batch_size, progress), rows.truth)
    losses = torch.zeros(len(rows.texts), dtype=torch.float64)
    for indices in batches(rows.lengths, batch_size, progress):
        texts, targets = [rows.texts[i] for i in indices], [rows.targets[i] for i in indices]
        losses[indices] = -target_log_likelihoods(backend, texts, targets)
    return RowScores(losses, rows.weights, None, None)
