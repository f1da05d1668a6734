"""Predictions and scores of a tuned prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..base.modules import evaluating
from ..hf.generation_options import with_end_token
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.collation import pad_token_id, padded
from ..tasks.containers import as_rows
from ..tasks.cuts import counting_cuts
from ..tasks.encoding import encode_text, label_words, moved_space
from ..tasks.examples import Examples
from ..tasks.task import Task
from .heads import evaluate_rows, predict_rows
from .likelihood import Ids, ModelBackend, Progress, batches, encode_rows, label_table, score_rows


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
        prompt: name of the prompt; None: the task's, or none for a model without prompts.
        progress: called with the number of rows done since its last call.

    Returns:
        Classification: ``{"prediction": label, "scores": {label: probability}}``, probabilities among the labels.
        Generation: ``{"prediction": text}``. Heads: see :func:`~.head_results.result_of`.
    """
    rows = as_rows(rows)
    if task.head is not None:
        with evaluating(model):
            return predict_rows(model, tokenizer, task, rows, prompt_name(model, task, prompt), batch_size, progress)
    backend = ModelBackend(model, prompt_name(model, task, prompt))
    with counting_cuts():
        texts = [encode_text(task, row, tokenizer, encoder_decoder=backend.encoder_decoder) for row in rows]
    with evaluating(model):
        if task.kind == "classification":
            words = label_words(task, tokenizer, encoder_decoder=backend.encoder_decoder)
            table = label_table(backend, texts, words, batch_size, progress)
            every = [dict(zip(task.labels, row, strict=True)) for row in table.exp().tolist()]
            return [{"prediction": max(scores, key=scores.__getitem__), "scores": scores} for scores in every]
        predictions: Examples = [{} for _ in rows]
        space = " " if moved_space(task) and not backend.encoder_decoder else ""
        for indices in batches([len(text) for text in texts], batch_size, progress):
            answers = _generate(backend, tokenizer, [texts[i] for i in indices], max_new_tokens)
            for i, answer in zip(indices, answers, strict=True):
                predictions[i] = {"prediction": answer.removeprefix(space)}
        return predictions


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
        of the responses) and ``perplexity``. Both: ``rows``. Heads: see :func:`~.heads.evaluate_rows`.

    Raises:
        ValueError: no rows, a row without text or target (``tasks.complete_rows`` leaves such rows out), or a label
            that the task does not know.
    """
    rows = as_rows(rows)
    if task.head is not None:
        with evaluating(model):
            return evaluate_rows(model, tokenizer, task, rows, prompt_name(model, task, prompt), batch_size, progress)
    backend = ModelBackend(model, prompt_name(model, task, prompt))
    encoded = encode_rows(task, rows, tokenizer, encoder_decoder=backend.encoder_decoder)
    with evaluating(model):
        return score_rows(backend, encoded, batch_size, progress).metrics(encoded.truth)


def evaluate_bare(
    model: SoftPromptModel, tokenizer: Any, task: Task, rows: Examples, batch_size: int
) -> dict[str, float]:
    """Scores of the model without any prompt in front."""
    if task.head is not None:  # another model object would freeze a head that is being trained
        with evaluating(model):
            return evaluate_rows(model, tokenizer, task, rows, None, batch_size)
    return evaluate(
        SoftPromptModel(model.base_model), tokenizer, replace(task, special_tokens=True), rows, batch_size=batch_size
    )


def prompt_name(model: SoftPromptModel, task: Task, prompt: str | None) -> str | None:
    """The prompt to use: the one that was asked for, or the task's; None for a model without prompts."""
    return (prompt or task.prompt) if len(model.prompts) else None


def _generate(backend: ModelBackend, tokenizer: Any, texts: Ids, max_new_tokens: int) -> list[str]:
    pad = pad_token_id(tokenizer)
    ids, mask = padded(texts, backend.model.device, value=pad)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    options |= {"num_return_sequences": 1, "return_dict_in_generate": False}  # whatever the model's configuration says
    options = with_end_token(backend.model.base_model, tokenizer.eos_token_id, options)
    output = backend.model.generate(ids, mask, backend.prompt_ids, **options)
    if not backend.encoder_decoder:
        output = output[:, ids.shape[1] :]
    answers: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
    return answers
