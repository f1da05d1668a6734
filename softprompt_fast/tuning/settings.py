"""How a prompt is tuned: one dataclass for Python, the command line and what is written beside a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from .objective import OBJECTIVES

OPTIMIZERS = ("adamw", "adafactor")
CRITERIA = ("loss", "accuracy")
SCHEDULES = ("cosine", "linear", "constant")
FORMS = ("none", "residual", "low-rank")
PLACEMENTS = ("before_bos", "after_bos")
DEFAULT_TOKENS = 20
DEFAULT_STEPS = 120


@dataclass(frozen=True)
class TuningSettings:
    """Settings of :func:`tune`. What the defaults rest on: ``docs/recipes.md``."""

    num_virtual_tokens: int | None = None
    """P; None: 20, or as many as ``init`` brings."""
    init: str | Tensor | PathLike[str] = "auto"
    """"auto": for classification an instruction that names the labels, else "vocabulary"; or whatever
    :meth:`FastSoftPrompt.add_prompt` takes, such as the folder of another task's prompt to start from."""
    init_text: str | None = None
    """The text of ``init="text"``."""
    init_noise: float = 0.0
    """Spread of noise added to the first values, in their own standard deviations."""
    objective: str = "labels"
    """"labels": cross entropy among the label words, where each is one token; "vocabulary": among all tokens."""
    label_smoothing: float = 0.0
    """Share of the target spread over the other answers, 0 to 1."""
    optimizer: str = "adamw"
    """"adamw", or "adafactor" as in Lester et al. 2021 (with ``schedule="constant"``, ``learning_rate=0.3``)."""
    learning_rate: float = 3e-2
    schedule: str = "cosine"
    """"cosine" or "linear", down to 0, or "constant"; all behind a warm-up over a twentieth of the steps."""
    batch_size: int = 32
    """Rows per step and prompt."""
    gradient_accumulation_steps: int = 1
    steps: int | None = None
    """Optimiser steps; None: ``epochs`` passes over the rows, or 120."""
    epochs: float | None = None
    eval_every: int | None = None
    """Steps between evaluations, which also decide what is best; None: five per run."""
    best_by: str = "loss"
    """What makes a state the best on the held-out rows: the lowest "loss" (among the labels, for a classification), or
    the highest "accuracy", which is coarse: of 200 rows its standard error is 2 to 3 points."""
    patience: int | None = None
    """Early stopping: evaluations in a row without a better score before the run ends; None: never."""
    max_grad_norm: float = 1.0
    decay_to_initial: float = 0.0
    """Weight decay of the distance from the initial prompt."""
    prompt_dropout: float = 0.0
    """Probability with which a number of the prompt is dropped in a training step."""
    norm_bound: float | None = None
    """Longest vector, in mean norms of the model's token embeddings; None: no bound."""
    reparameterization: str = "none"
    """"none", "residual" (an MLP beside the prompt) or "low-rank" (an update of ``rank``); folded when saved."""
    rank: int = 8
    """Of "low-rank"."""
    bottleneck: int = 128
    """Width inside "residual"."""
    token_update_rank: int | None = None
    """DePT: rank of a low-rank update of the text's token embeddings, by place, beside the prompt; None: none."""
    token_update_learning_rate: float = 1e-3
    placement: str = "before_bos"
    """Of the prompt; "after_bos" saves BOS's vector as the prompt's first one."""
    seed: int = 0
    """Of the initialisation and the order of rows: the same seed gives the same prompt."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", OBJECTIVES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("best_by", CRITERIA),
            ("reparameterization", FORMS),
            ("placement", PLACEMENTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "gradient_accumulation_steps", "rank", "bottleneck"):
            _check(isinstance(getattr(self, name), int) and getattr(self, name) >= 1, self, name, "a positive integer")
        for name in ("num_virtual_tokens", "steps", "eval_every", "patience", "token_update_rank"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, int) and value >= 1), self, name, "a positive integer or None")
        for name in ("learning_rate", "token_update_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _check(_is_number(value) and value > 0, self, name, "positive")
        for name in ("epochs", "norm_bound"):
            value = getattr(self, name)
            _check(value is None or (_is_number(value) and value > 0), self, name, "positive or None")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"`epochs` must be None where `steps` is given, got {self.epochs}")
        for name in ("label_smoothing", "prompt_dropout"):
            value = getattr(self, name)
            _check(_is_number(value) and 0 <= value < 1, self, name, "at least 0 and below 1")
        for name in ("decay_to_initial", "init_noise"):
            value = getattr(self, name)
            _check(_is_number(value) and value >= 0, self, name, "0 or more")
        if self.reparameterization == "low-rank" and self.decay_to_initial:
            raise ValueError(
                f"`decay_to_initial` must be 0 with reparameterization='low-rank', got {self.decay_to_initial}"
            )
        text = isinstance(self.init, str) and self.init == "text"
        if self.init_text is not None and not text:
            raise ValueError(f"`init_text` must be None unless init='text', got {self.init_text!r}")
        if text and not self.init_text:
            raise ValueError(f"`init_text` must hold text for init='text', got {self.init_text!r}")

    def with_changes(self, changes: Mapping[str, Any]) -> TuningSettings:
        """The same with some fields replaced.

        Raises:
            TypeError: not a setting.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"`{name}` is not a setting of tuning, which has {', '.join(known)}")
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        init = self.init
        return found | {"init": f"tensor {list(init.shape)}" if isinstance(init, Tensor) else fspath(init)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(holds: bool, settings: TuningSettings, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {getattr(settings, name)!r}")


def instruction(label_words: Mapping[str, str]) -> str:
    """A sentence that asks for one of the labels, such as "Decide whether the following text is good or bad."."""
    words = [word.strip() for word in label_words.values()]
    return f"Decide whether the following text is {', '.join(words[:-1])} or {words[-1]}.\n"
