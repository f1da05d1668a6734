"""A search before its first step: what its arguments must be, what its steps will cost, what must not change."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..hf.architecture import context_length, is_encoder_decoder
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.encoding import encode, label_token_ids
from ..tasks.examples import Examples, digest
from ..tasks.task import Task
from ..tuning.settings import DEFAULT_STEPS, DEFAULT_TOKENS, TuningSettings
from .budget import Costs
from .study import LogRange

SAMPLE = 500
"""Rows whose tokens are counted to estimate costs."""
INITS = ("auto", "random", "vocabulary", "class_labels", "text")


def checked_settings(settings: TuningSettings) -> TuningSettings:
    """With F in ``steps``.

    Raises:
        ValueError: a setting that a search has no use for.
    """
    for name, instead in (
        ("num_virtual_tokens", "`lengths` say it"),
        ("epochs", "`steps` are counted"),
        ("eval_every", "candidates are scored at the end of each rung"),
        ("patience", "candidates are scored at the end of each rung"),
        ("token_update_rank", "candidates are scored as prompts alone"),
    ):
        if getattr(settings, name) is not None:
            raise ValueError(f"`{name}` must be None in a search, for {instead}; got {getattr(settings, name)!r}")
    if not isinstance(settings.init, str) or settings.init not in INITS:
        shown = settings.to_json()["init"]
        raise ValueError(f"`init` must be one of {', '.join(INITS)} in a search, to fit any length; got {shown}")
    return replace(settings, steps=settings.steps or DEFAULT_STEPS)


def checked_lengths(lengths: Sequence[int], settings: TuningSettings) -> list[int]:
    """Sorted."""
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ValueError(f"`lengths` must be one or more positive integers, got {list(lengths)!r}")
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"`lengths` must be different, got {list(lengths)}")
    if settings.reparameterization == "low-rank" and settings.rank > min(lengths):
        raise ValueError(f"`rank` must be {min(lengths)} at most, the shortest of `lengths`, got {settings.rank}")
    return sorted(lengths)


def checked_rates(rates: Sequence[float] | LogRange | None, settings: TuningSettings) -> list[float] | LogRange:
    """The rates to try with every length; None: the settings' one."""
    if isinstance(rates, LogRange):
        return rates
    found = [settings.learning_rate] if rates is None else [float(rate) for rate in rates]
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise ValueError(f"`learning_rates` must be one or more positive, different numbers, got {found}")
    return sorted(found)


def check_rows(task: Task, train_rows: Examples, held_out_rows: Examples, test_rows: Examples) -> None:
    """Every row, before any work is lost on the others."""
    for name, rows, least in (("train_rows", train_rows, 1), ("held_out_rows", held_out_rows, 2)):
        if len(rows) < least:
            raise ValueError(f"`{name}` must hold at least {least} rows, got {len(rows)}")
    for row in (*train_rows, *held_out_rows, *test_rows):
        task.text(row)
        task.target(row)


def check_room(model: SoftPromptModel, longest_prompt: int, longest_row: int) -> None:
    """That the longest prompt and the longest row seen fit the model's context."""
    context = context_length(model.config)
    if context is not None and longest_prompt + longest_row > context:
        raise ValueError(
            f"`lengths` must leave room for texts of {longest_row} tokens in the model's context of {context}: "
            f"{context - longest_row} at most, got {longest_prompt}"
        )


def measure_costs(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    settings: TuningSettings,
    longest_prompt: int,
) -> Costs:
    """Costs from the tokens of a sample of the rows; also checks that the longest of them fit the context."""
    encoder_decoder = is_encoder_decoder(model.base_model)
    draw = random.Random(settings.seed)

    def lengths(rows: Examples) -> list[int]:
        features = encode(task, draw.sample(rows, min(SAMPLE, len(rows))), tokenizer, encoder_decoder=encoder_decoder)
        return [len(f["input_ids"]) + (len(f["labels"]) if encoder_decoder else 0) for f in features]

    train, held_out = lengths(train_rows), lengths(held_out_rows)
    check_room(model, longest_prompt, max(*train, *held_out))
    rows = settings.batch_size * settings.gradient_accumulation_steps
    passes = 1  # over a text, to score it
    if task.kind == "classification" and (encoder_decoder or label_token_ids(task, tokenizer) is None):
        passes = len(task.labels)
    if isinstance(model, DeepPromptModel):
        per_step = per_row = 0.0  # nothing of the prompt runs
    elif model.runner is None or model.runner.unsupported is not None or encoder_decoder:
        per_step, per_row = float(rows), float(passes)
    else:
        per_step, per_row = float(settings.gradient_accumulation_steps), passes / settings.batch_size
    return Costs(
        rows * sum(train) / len(train), per_step, passes * sum(held_out) / len(held_out), per_row, len(held_out_rows)
    )


def full_length(lengths: Sequence[int]) -> int:
    """Length of the full run that a budget counts in: the usual one, or the nearest that is searched."""
    return max(min(lengths), min(max(lengths), DEFAULT_TOKENS))


def facts(
    model: SoftPromptModel,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    settings: TuningSettings,
    lengths: list[int],
    rates: list[float] | LogRange,
    budget: float,
) -> dict[str, Any]:
    """All that decides the result, by the names of `search`'s arguments, as JSON gives it back."""
    found = {
        "model": f"{type(model).__name__} on {getattr(model.base_model, 'name_or_path', '')}",
        "task": asdict(task),
        "lengths": lengths,
        "learning_rates": str(rates),
        "budget": budget,
        "train_rows": digest(train_rows),
        "held_out_rows": digest(held_out_rows),
    } | settings.to_json()
    return json.loads(json.dumps(found))
