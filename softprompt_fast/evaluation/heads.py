"""Predictions and scores of a task that a model's head answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.collation import Collator, pad_token_id
from ..tasks.cuts import counting_cuts
from ..tasks.examples import check_complete
from ..tasks.head import SEQUENCE
from ..tasks.head_encoding import Part, answer_tokens, encode_parts
from ..tasks.task import Task
from .head_results import result_of
from .intervals import mean_interval, wilson_interval
from .likelihood import Progress, batches
from .scores import RowScores
from .spans import answer_f1, are_bio, entities, exact_match

Row = Mapping[str, Any]


@torch.no_grad()
def head_outputs(
    model: SoftPromptModel, tokenizer: Any, parts: Sequence[Part], prompts: Sequence[str | None]
) -> list[Tensor]:
    """The head's numbers for a batch, float64 on the host: [C], [T, C], or [2, T] for each part.

    Args:
        prompts: the prompt of each part; None: no prompt.
    """
    features = [
        {"input_ids": part.input_ids} | ({} if part.token_type_ids is None else {"token_type_ids": part.token_type_ids})
        for part in parts
    ]
    batch = Collator(pad_token_id(tokenizer))(features)
    batch.pop("lengths")
    on_device = {name: values.to(model.device) for name, values in batch.items()}
    output = model(**on_device, prompt_ids=list(prompts))
    if output.get("start_logits") is not None:
        numbers = torch.stack([output.start_logits, output.end_logits], 1)  # [B, 2, T]
    else:
        numbers = output.logits
    numbers = numbers.double().cpu()
    if not numbers.isfinite().all():
        raise ValueError("the model's logits are not finite")
    if numbers.dim() == 2:
        return list(numbers)
    if output.get("start_logits") is not None:
        return [row[:, : len(part.input_ids)] for row, part in zip(numbers, parts, strict=True)]
    return [row[: len(part.input_ids)] for row, part in zip(numbers, parts, strict=True)]


def run_rows(
    model: SoftPromptModel,
    tokenizer: Any,
    rows: Sequence[Sequence[Part]],
    prompt: str | None,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """The head's numbers for the parts of each row, in batches of parts of similar lengths."""
    places = [(row, number) for row, parts in enumerate(rows) for number in range(len(parts))]
    results: list[list[Tensor]] = [[torch.empty(0)] * len(parts) for parts in rows]
    left = [len(parts) for parts in rows]
    for indices in batches([len(rows[row][number].input_ids) for row, number in places], batch_size, None):
        chosen = [places[i] for i in indices]
        outputs = head_outputs(model, tokenizer, [rows[row][n] for row, n in chosen], [prompt] * len(chosen))
        finished = 0
        for (row, number), output in zip(chosen, outputs, strict=True):
            results[row][number] = output
            left[row] -= 1
            finished += left[row] == 0
        if progress is not None:
            progress(finished)
    return results


def predict_rows(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: str | None,
    batch_size: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The answer to each row; see :func:`result_of`."""
    with counting_cuts():
        parts = [encode_parts(task, row, tokenizer) for row in rows]
    outputs = run_rows(model, tokenizer, parts, prompt, batch_size, progress)
    return [result_of(task, *each) for each in zip(rows, parts, outputs, strict=True)]


def evaluate_rows(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: str | None,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores on labelled rows.

    Returns:
        ``loss``, ``rows``, and with 95 % intervals (``_low``, ``_high``): ``accuracy``, with ``macro_f1``, of a
        classification; ``accuracy`` of words, and for BIO tags ``span_f1`` (with ``span_precision`` and
        ``span_recall``); ``exact_match`` and ``f1`` of answers.

    Raises:
        ValueError: no rows, or a row without text or target.
    """
    assert task.head is not None
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none")
    check_complete(task, rows, "rows")
    with counting_cuts():
        parts = [encode_parts(task, row, tokenizer) for row in rows]
    outputs = run_rows(model, tokenizer, parts, prompt, batch_size, progress)
    if task.head.name == SEQUENCE:
        table = torch.stack([output[0] for output in outputs]).log_softmax(-1)
        truth = torch.tensor([task.labels.index(task.label(row)) for row in rows])
        return RowScores.of_labels(table, truth).metrics(truth)
    answers = [result_of(task, *each)["prediction"] for each in zip(rows, parts, outputs, strict=True)]
    if task.kind == "tagging":
        return _tagging_scores(task, rows, parts, outputs, answers)
    return _answering_scores(task, rows, parts, outputs, answers)


def _tagging_scores(
    task: Task,
    rows: Sequence[Row],
    parts: Sequence[Sequence[Part]],
    outputs: Sequence[Sequence[Tensor]],
    predicted: Sequence[Sequence[str | None]],
) -> dict[str, float]:
    truth = [task.tags(row) for row in rows]
    loss, tokens = 0.0, 0
    for tags, some, numbers in zip(truth, parts, outputs, strict=True):
        for part, logits in zip(some, numbers, strict=True):
            targets = torch.tensor([task.labels.index(tags[word]) for word in part.words], dtype=torch.int64)
            loss += F.cross_entropy(logits[list(part.columns)], targets, reduction="sum").item()
            tokens += len(targets)
    pairs = [list(zip(*each, strict=True)) for each in zip(truth, predicted, strict=True)]
    right = torch.tensor([sum(a == b for a, b in row) for row in pairs])
    words = torch.tensor([len(tags) for tags in truth])
    scores = _share("accuracy", right.double(), words.double())
    if are_bio(task.labels):
        spans = [(entities(a) & entities(b), entities(a), entities(b)) for a, b in zip(truth, predicted, strict=True)]
        found, true, said = torch.tensor([list(map(len, row)) for row in spans], dtype=torch.float64).unbind(1)
        scores |= _share("span_f1", 2 * found, true + said)
        scores |= {"span_precision": _ratio(found, said), "span_recall": _ratio(found, true)}
    return scores | {"loss": loss / max(tokens, 1), "words": int(words.sum()), "rows": len(rows)}


def _answering_scores(
    task: Task,
    rows: Sequence[Row],
    parts: Sequence[Sequence[Part]],
    outputs: Sequence[Sequence[Tensor]],
    predicted: Sequence[str],
) -> dict[str, float]:
    truth = [[text for text, _ in task.answers(row)] for row in rows]
    losses = []
    for row, some, numbers in zip(rows, parts, outputs, strict=True):
        for number, span in answer_tokens(some, task.answers(row)).items():
            ends = numbers[number].log_softmax(-1)[torch.arange(2), torch.tensor(span)]
            losses.append(-ends.mean().item())
    if not losses:
        raise ValueError("no answer lies in one part of its context; give a larger `stride`")
    hits = sum(exact_match(said, answers) for said, answers in zip(predicted, truth, strict=True))
    f1 = torch.tensor([answer_f1(*each) for each in zip(predicted, truth, strict=True)], dtype=torch.float64)
    low, high = wilson_interval(hits, len(rows))
    scores = {"exact_match": hits / len(rows), "exact_match_low": low, "exact_match_high": high}
    scores |= _share("f1", f1, torch.ones_like(f1))
    return scores | {"loss": sum(losses) / len(losses), "rows": len(rows)}


def _ratio(sums: Tensor, weights: Tensor) -> float:
    total = weights.sum().item()
    return sums.sum().item() / total if total else 0.0


def _share(name: str, sums: Tensor, weights: Tensor) -> dict[str, float]:
    """A mean of a share over rows, and its 95 % interval if there are several rows."""
    values = {name: _ratio(sums, weights)}
    if len(sums) > 1 and weights.sum() > 0:
        low, high = mean_interval(sums, weights)
        values |= {f"{name}_low": max(0.0, low), f"{name}_high": min(1.0, high)}
    return values
