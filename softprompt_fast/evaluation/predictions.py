"""Predictions and scores of a tuned prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.collation import Collator, length_order, pad_token_id
from ..tasks.encoding import encode, encode_text
from ..tasks.examples import Examples
from ..tasks.task import Task
from .intervals import wilson_interval

Progress = Callable[[int], None]


def predict(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> Examples:
    """A prediction for each row, in their order.

    Args:
        prompt: name of the prompt; None: the task's, or none at all for a model without prompts.
        progress: called with the number of rows done since its last call.

    Returns:
        Classification: ``{"prediction": label, "scores": {label: probability}}``, probabilities among the labels.
        Generation: ``{"prediction": text}``.
    """
    prompt = _chosen(model, task, prompt)
    encoder_decoder = is_encoder_decoder(model.base_model)
    texts = [encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in rows]
    results: Examples = [{} for _ in rows]
    collate = Collator(pad_token_id(tokenizer))
    training = model.training
    model.eval()
    try:
        for indices in length_order([len(text) for text in texts], batch_size):
            chosen = [texts[i] for i in indices]
            if task.kind == "classification":
                found = _classify(model, tokenizer, task, chosen, prompt, collate)
            else:
                found = _generate(model, tokenizer, chosen, prompt, collate, max_new_tokens)
            for i, result in zip(indices, found, strict=True):
                results[i] = result
            if progress is not None:
                progress(len(indices))
    finally:
        model.train(training)
    return results


def evaluate(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores on labelled rows.

    Returns:
        Classification: ``accuracy``, a 95 % Wilson interval (``accuracy_low``, ``accuracy_high``), ``macro_f1`` and
        ``loss`` (mean negative log-probability of the right label among the labels). Generation: ``loss`` (per token
        of the responses) and ``perplexity``. Both: ``rows``.
    """
    if task.kind == "generation":
        return _response_loss(model, tokenizer, task, rows, batch_size, prompt, progress)
    predictions = predict(model, tokenizer, task, rows, batch_size=batch_size, prompt=prompt, progress=progress)
    return classification_scores(task, rows, predictions)


def classification_scores(task: Task, rows: Examples, predictions: Examples) -> dict[str, float]:
    """Scores of predictions as ``predict`` gives them."""
    truth = [str(row[task.target_column]) for row in rows]
    for label in truth:
        if label not in task.label_words:
            raise ValueError(f"label {label!r} is not among the task's labels {task.labels}")
    from sklearn.metrics import f1_score

    guessed = [p["prediction"] for p in predictions]
    correct = sum(a == b for a, b in zip(guessed, truth, strict=True))
    low, high = wilson_interval(correct, len(rows))
    losses = [-math.log(max(p["scores"][label], 1e-30)) for p, label in zip(predictions, truth, strict=True)]
    return {
        "accuracy": correct / len(rows),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(f1_score(truth, guessed, average="macro")),
        "loss": sum(losses) / len(losses),
        "rows": len(rows),
    }


def _chosen(model: SoftPromptModel, task: Task, prompt: str | None) -> str | None:
    return (prompt or task.prompt) if len(model.prompts) else None


def _classify(
    model: SoftPromptModel, tokenizer: Any, task: Task, texts: list[list[int]], prompt: str | None, collate: Collator
) -> Examples:
    words = [list(tokenizer(word, add_special_tokens=False).input_ids) for word in task.label_words.values()]
    one_token = all(len(word) == 1 for word in words)
    if one_token and not is_encoder_decoder(model.base_model):
        batch = _to_device(collate([{"input_ids": text} for text in texts]), model.device)
        logits = model.next_token_logits(batch["input_ids"], batch["attention_mask"], prompt)
        scores = logits.float().log_softmax(-1)[:, [word[0] for word in words]]
    else:
        columns = [_log_likelihood(model, tokenizer, texts, word, prompt, collate) for word in words]
        scores = torch.stack(columns, 1)
    results: Examples = []
    for row in scores.softmax(-1).tolist():
        by_label = dict(zip(task.labels, row, strict=True))
        results.append({"prediction": max(by_label, key=by_label.__getitem__), "scores": by_label})
    return results


@torch.no_grad()
def _log_likelihood(
    model: SoftPromptModel,
    tokenizer: Any,
    texts: list[list[int]],
    word: list[int],
    prompt: str | None,
    collate: Collator,
) -> Tensor:
    """[B], the log-probability of a word of any number of tokens behind each text."""
    if is_encoder_decoder(model.base_model):
        batch = _to_device(collate([{"input_ids": text} for text in texts]), model.device)
        labels = torch.tensor([[*word, tokenizer.eos_token_id]] * len(texts), device=model.device)
        logits = model(batch["input_ids"], batch["attention_mask"], labels, prompt).logits
        chosen = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return chosen[:, : len(word)].sum(1)
    batch = _to_device(collate([{"input_ids": [*text, *word]} for text in texts]), model.device)
    logits = model(batch["input_ids"], batch["attention_mask"], None, prompt).logits
    ends = batch["attention_mask"].sum(1)
    total = torch.zeros(len(texts), device=model.device)
    for i, token in enumerate(word):
        at = ends - len(word) + i - 1
        total += logits[torch.arange(len(texts), device=model.device), at].float().log_softmax(-1)[:, token]
    return total


def _generate(
    model: SoftPromptModel,
    tokenizer: Any,
    texts: list[list[int]],
    prompt: str | None,
    collate: Collator,
    max_new_tokens: int,
) -> Examples:
    batch = _to_device(collate([{"input_ids": text} for text in texts]), model.device)
    output = model.generate(
        batch["input_ids"],
        batch["attention_mask"],
        prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id(tokenizer),
    )
    if not is_encoder_decoder(model.base_model):
        output = output[:, batch["input_ids"].shape[1] :]
    return [{"prediction": text} for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


@torch.no_grad()
def _response_loss(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    batch_size: int,
    prompt: str | None,
    progress: Progress | None,
) -> dict[str, float]:
    encoder_decoder = is_encoder_decoder(model.base_model)
    features = encode(task, rows, tokenizer, encoder_decoder=encoder_decoder)
    collate = Collator(pad_token_id(tokenizer))
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for indices in length_order([len(feature["input_ids"]) for feature in features], batch_size):
        batch = _to_device(collate([features[i] for i in indices]), model.device)
        loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"], _chosen(model, task, prompt)).loss
        count = int((batch["labels"] != -100).sum())
        total, tokens = total + loss.item() * count, tokens + count
        if progress is not None:
            progress(len(indices))
    model.train(training)
    mean = total / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "rows": len(rows)}


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def evaluate_bare(
    model: SoftPromptModel, tokenizer: Any, task: Task, rows: Examples, batch_size: int
) -> dict[str, float]:
    """Scores of the model without any prompt in front."""
    return evaluate(
        SoftPromptModel(model.base_model), tokenizer, replace(task, special_tokens=True), rows, batch_size=batch_size
    )


def describe_scores(scores: dict[str, float]) -> str:
    """Scores in words."""
    if "accuracy" in scores:
        low, high = scores["accuracy_low"], scores["accuracy_high"]
        return f"accuracy {scores['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {scores['rows']:.0f} rows)"
    return f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f} ({scores['rows']:.0f} rows)"
