"""The progress of training: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..base import progress
from ..evaluation.scores import main_score


class RichProgress(TrainerCallback):
    """Step, loss, score, tokens per second, time left.

    Args:
        tokens_seen: returns the number of tokens that this process has trained on.
    """

    def __init__(self, console: Console, tokens_seen: Callable[[], int]) -> None:
        self._console = console
        self._tokens_seen = tokens_seen
        self._loss = self._score = ""
        self._start = self._line = 0.0
        self._evaluating = 0.0
        self._first_step = 0
        self._first_end = 0.0
        self._step_end = 0.0
        self._bar = Progress(
            TextColumn("tuning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._step_end = time.perf_counter()
        self._first_step = state.global_step
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, facts="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._step_end = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        self._first_end = self._first_end or now
        speed = f"{self._tokens_seen() / max(seconds - self._evaluating, 1e-9):,.0f} tokens/s"
        facts = ", ".join(part for part in (self._loss, self._score, speed) if part)
        self._bar.update(self._task, completed=state.global_step, facts=facts)
        if not self._console.is_terminal and now - self._line >= progress.LINE_SECONDS:
            self._line = now
            facts = ", ".join(part for part in (self._loss, speed, self._time_left(state)) if part)
            self._print(f"step {state.global_step}/{state.max_steps}: {facts}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.3f}"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluating += time.perf_counter() - self._step_end
        metrics = kwargs["metrics"]
        scores = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        name = main_score(scores) or "loss"
        self._score = f"held-out {name.replace('_', ' ')} {scores[name]:.3f}"
        self._print(f"step {state.global_step}: {self._score}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.stop()

    def _time_left(self, state: Any) -> str:
        """Not after the first step, which is no measure: it also checks the packed layout."""
        done = state.global_step - self._first_step - 1
        if done < 1:
            return ""
        return f"{clock((state.max_steps - state.global_step) * (self._step_end - self._first_end) / done)} left"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Such as "8 s" or "2 min 05 s"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
