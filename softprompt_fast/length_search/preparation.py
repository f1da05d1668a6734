"""A search before its first step: checks of its arguments, estimated costs, the plan, the facts to resume by."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..hf.architecture import context_length, is_encoder_decoder
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..tasks.encoding import encode, label_words
from ..tasks.examples import Examples, digest
from ..tasks.label_tree import LabelTree
from ..tasks.task import Task
from ..tuning.prompt_setup import check_form
from ..tuning.settings import DEFAULT_STEPS, DEFAULT_TOKENS, TuningSettings
from .budget import Costs, SearchPlan, make_plan
from .result import Candidate
from .study import LogRange

SAMPLE = 500
"""Rows whose tokens are counted to estimate costs."""
INITS = ("auto", "random", "vocabulary", "class_labels", "text")
TRIALS_FOLDER = "trials"


@dataclass(frozen=True)
class PreparedSearch:
    """A search that can start: its arguments are checked and its plan keeps to the budget."""

    model: SoftPromptModel
    tokenizer: Any
    task: Task
    train_rows: Examples
    """In a random order. Rungs take rows from the front, so all candidates of a rung learn from the same rows."""
    held_out_rows: Examples
    """In a random order. Rungs take rows from the front, so all candidates of a rung are scored by the same rows."""
    output: Path
    settings: TuningSettings
    full_steps: int
    """F, the steps of one full run."""
    lengths: list[int]
    rates: list[float] | LogRange
    best_by: str
    """The score that ranks candidates: "loss", or "accuracy" and then loss."""
    plan: SearchPlan
    facts: dict[str, Any]
    """See :func:`search_facts`."""
    console: Console

    @property
    def rows_per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation_steps

    def folder(self, candidate: Candidate, number: int) -> Path:
        """The output folder of a candidate's run in a rung."""
        name = f"{candidate.number:03d}-length-{candidate.num_virtual_tokens}-lr-{candidate.learning_rate:g}"
        return self.output / TRIALS_FOLDER / name / f"rung-{number}"

    def name(self, candidate: Candidate) -> str:
        several_rates = isinstance(self.rates, LogRange) or len(self.rates) > 1
        return candidate.describe(with_rate=several_rates)


def prepare_search(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    test_rows: Examples,
    output: Path,
    settings: TuningSettings,
    *,
    lengths: Sequence[int],
    rates: Sequence[float] | LogRange | None,
    budget: float,
    console: Console,
) -> PreparedSearch:
    """Checks the arguments of :func:`search` and plans its rungs; writes nothing.

    Raises:
        ValueError: an argument is not possible, or the budget leaves too few steps.
    """
    settings, full_steps = checked_settings(settings)
    if task.prompt in model.prompts:
        raise ValueError(f"the model already has a prompt {task.prompt!r}; remove it, or give the task another name")
    check_rows(task, train_rows, held_out_rows, test_rows)
    check_form(model, tokenizer, settings)
    if settings.placement == "after_bos" or not task.literal:
        task = replace(task, special_tokens=settings.placement != "after_bos", literal=False)
    lengths, rates = checked_lengths(lengths, settings), checked_rates(rates, settings)
    facts = search_facts(model, task, train_rows, held_out_rows, settings, lengths, rates, budget)
    longest = max(lengths) + (settings.placement == "after_bos")
    costs = measure_costs(model, tokenizer, task, train_rows, held_out_rows, settings, longest)
    draws = rates.draws if isinstance(rates, LogRange) else len(rates)
    every = [length for length in lengths for _ in range(draws)]
    return PreparedSearch(
        model=model,
        tokenizer=tokenizer,
        task=task,
        train_rows=random.Random(settings.seed).sample(train_rows, len(train_rows)),
        held_out_rows=random.Random(settings.seed).sample(held_out_rows, len(held_out_rows)),
        output=output,
        settings=settings,
        full_steps=full_steps,
        lengths=lengths,
        rates=rates,
        best_by=settings.best_by if task.kind == "classification" else "loss",
        plan=make_plan(costs, every, full_steps, full_length(lengths), budget),
        facts=facts,
        console=console,
    )


def checked_settings(settings: TuningSettings) -> tuple[TuningSettings, int]:
    """The settings with F in ``steps``, and F.

    Raises:
        ValueError: a setting that a search cannot use.
    """
    for name, reason in (
        ("num_virtual_tokens", "`lengths` sets it"),
        ("epochs", "runs are counted in `steps`"),
        ("eval_every", "candidates are scored at the end of each rung"),
        ("patience", "candidates are scored at the end of each rung"),
        ("token_update_rank", "candidates are scored without token updates"),
    ):
        if getattr(settings, name) is not None:
            raise ValueError(f"`{name}` must be None in a search because {reason}, got {getattr(settings, name)!r}")
    if not isinstance(settings.init, str) or settings.init not in INITS:
        shown = settings.to_json()["init"]
        raise ValueError(f"`init` must be one of {', '.join(INITS)} in a search, to fit any length, got {shown}")
    full_steps = settings.steps or DEFAULT_STEPS
    return replace(settings, steps=full_steps), full_steps


def checked_lengths(lengths: Sequence[int], settings: TuningSettings) -> list[int]:
    """The lengths, the shortest first."""
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ValueError(f"`lengths` must be one or more positive integers, got {list(lengths)!r}")
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"`lengths` must be different, got {list(lengths)}")
    if settings.reparameterization == "low-rank" and settings.rank > min(lengths):
        raise ValueError(f"`rank` must be {min(lengths)} at most, the shortest of `lengths`, got {settings.rank}")
    return sorted(lengths)


def checked_rates(rates: Sequence[float] | LogRange | None, settings: TuningSettings) -> list[float] | LogRange:
    """The rates to try with every length, the lowest first; None: the rate of the settings."""
    if isinstance(rates, LogRange):
        return rates
    values = [settings.learning_rate] if rates is None else [float(rate) for rate in rates]
    if not values or min(values) <= 0 or len(set(values)) < len(values):
        raise ValueError(f"`learning_rates` must be one or more positive, different numbers, got {values}")
    return sorted(values)


def check_rows(task: Task, train_rows: Examples, held_out_rows: Examples, test_rows: Examples) -> None:
    """Checks every row before any work is done."""
    for name, rows, least in (("train_rows", train_rows, 1), ("held_out_rows", held_out_rows, 2)):
        if len(rows) < least:
            raise ValueError(f"`{name}` must hold at least {least} rows, got {len(rows)}")
    for row in (*train_rows, *held_out_rows, *test_rows):
        task.text(row)
        task.target(row)


def check_room(model: SoftPromptModel, longest_prompt: int, longest_row: int) -> None:
    """Checks that the longest prompt and the longest row of the sample fit the model's context."""
    context = context_length(model.base_model)
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
    passes = 1  # how often a text runs to be scored
    if task.kind == "classification":
        passes = len(LabelTree(label_words(task, tokenizer, encoder_decoder=encoder_decoder)).paths)
    if isinstance(model, DeepPromptModel):
        per_step = per_row = 0.0  # deep prompts run no prompt tokens
    elif model.runner is None or model.runner.unsupported is not None or encoder_decoder:
        per_step, per_row = float(rows), float(passes)
    else:
        per_step, per_row = float(settings.gradient_accumulation_steps), passes / settings.batch_size
    return Costs(
        rows * sum(train) / len(train), per_step, passes * sum(held_out) / len(held_out), per_row, len(held_out_rows)
    )


def full_length(lengths: Sequence[int]) -> int:
    """Length of the full run that the budget is counted in: the default, or the nearest one that is searched."""
    return max(min(lengths), min(max(lengths), DEFAULT_TOKENS))


def search_facts(
    model: SoftPromptModel,
    task: Task,
    train_rows: Examples,
    held_out_rows: Examples,
    settings: TuningSettings,
    lengths: list[int],
    rates: list[float] | LogRange,
    budget: float,
) -> dict[str, Any]:
    """All that decides the result, by the names of ``search``'s arguments, as JSON gives it back."""
    facts = {
        "model": f"{type(model).__name__} on {getattr(model.base_model, 'name_or_path', '')}",
        "task": task.to_json(),
        "lengths": lengths,
        "learning_rates": str(rates),
        "budget": budget,
        "train_rows": digest(train_rows),
        "held_out_rows": digest(held_out_rows),
    } | settings.to_json()
    return json.loads(json.dumps(facts))
