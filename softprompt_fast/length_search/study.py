"""The search's memory: an Optuna study in a journal file (JSON lines), so that a search that was killed goes on.

Its trials are the candidates. Optuna's own pruner of successive halving decides trial by trial, which lets the first
ones through whatever they score and bounds no budget; here a rung is decided when all of it is scored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.extras import require

logger = logging.getLogger("softprompt_fast")

JOURNAL = "study.jsonl"
NAME = "search"


@dataclass(frozen=True)
class LogRange:
    """Learning rates drawn log-uniformly."""

    low: float
    high: float
    draws: int = 2
    """For each length."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"`learning_rates` must range from a positive number to a larger, got {self}")
        if self.draws < 1:
            raise ValueError(f"`draws` must be at least 1, got {self.draws}")

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}:{self.draws}"


class Memory:
    """The study of an output folder, made or opened.

    Args:
        facts: what must be the same when a search goes on; compared with what was stored.

    Raises:
        ImportError: Optuna is not installed.
        FileNotFoundError: ``resume`` without a search.
        FileExistsError: there is a search, and ``resume`` was not asked for.
        ValueError: it was made with other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], direction: str, resume: bool) -> None:
        self.optuna = import_optuna()
        journal = folder / JOURNAL
        if resume and not journal.is_file():
            raise FileNotFoundError(f"nothing to resume: {folder} holds no search")
        if not resume and journal.exists():
            raise FileExistsError(f"{folder} already holds a search; resume it, or choose another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        backend = self.optuna.storages.journal
        file = backend.JournalFileBackend(str(journal), lock_obj=backend.JournalFileOpenLock(str(journal)))
        self.study = self.optuna.create_study(
            storage=self.optuna.storages.JournalStorage(file),
            study_name=NAME,
            direction=direction,
            pruner=self.optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        stored = self.study.user_attrs.get("facts")
        if stored is None:
            self.study.set_user_attr("facts", facts)
        elif stored != facts:
            changed = next(name for name in {**facts, **stored} if stored.get(name) != facts.get(name))
            raise ValueError(
                f"`{changed}` must be as when the search in {folder} began, {stored.get(changed)!r}, "
                f"got {facts.get(changed)!r}; choose another output folder"
            )

    def ask(self, lengths: Sequence[int], rates: Sequence[float] | LogRange, seed: int) -> list[dict[str, Any]]:
        """Number, length and learning rate of every candidate, drawn once; the shortest first."""
        wanted: list[dict[str, Any]] = []
        for length in lengths:
            if isinstance(rates, LogRange):
                wanted += [{"num_virtual_tokens": length}] * rates.draws
            else:
                wanted += [{"num_virtual_tokens": length, "learning_rate": rate} for rate in rates]
        ends = (rates.low, rates.high) if isinstance(rates, LogRange) else (min(rates), max(rates))
        for number in range(len(self._running()), len(wanted)):
            self.study.sampler = self.optuna.samplers.RandomSampler(seed + number)  # the same however often resumed
            if not self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,)):
                self.study.enqueue_trial(wanted[number])
            trial = self.study.ask()
            trial.suggest_categorical("num_virtual_tokens", list(lengths))
            trial.suggest_float("learning_rate", *ends, log=True)
        found = [
            {
                "number": trial.number,
                "num_virtual_tokens": trial.params["num_virtual_tokens"],
                "learning_rate": trial.params["learning_rate"],
            }
            for trial in self._running()
        ]
        return sorted(found, key=lambda values: (values["num_virtual_tokens"], values["learning_rate"]))

    def _running(self) -> list[Any]:
        """Trials that got their parameters; one that was killed before is left out."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if len(trial.params) == 2]

    def recall(self, number: int | None, key: str) -> Any:
        """What was stored under a key, of a trial or (None) of the search; None: nothing yet."""
        attributes = self.study.user_attrs if number is None else self._frozen(number).user_attrs
        return attributes.get(key)

    def store(self, number: int | None, key: str, value: Any) -> None:
        if number is None:
            self.study.set_user_attr(key, value)
        else:
            self._trial(number).set_user_attr(key, value)

    def report(self, number: int, step: int, score: float) -> None:
        """A candidate's score after so many steps; Optuna's plots read it."""
        if step not in self._frozen(number).intermediate_values:
            self._trial(number).report(score, step)

    def end(self, number: int, *, pruned: bool) -> None:
        """A candidate is done; its value is the last one reported."""
        trial = self._frozen(number)
        if not trial.state.is_finished():
            state = self.optuna.trial.TrialState
            value = None if pruned else trial.intermediate_values[max(trial.intermediate_values)]
            self.study.tell(number, value, state=state.PRUNED if pruned else state.COMPLETE)

    def _frozen(self, number: int) -> Any:
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def _trial(self, number: int) -> Any:
        return self.optuna.trial.Trial(self.study, self._frozen(number)._trial_id)


def import_optuna() -> Any:
    """Optuna, or an error that says what to install."""
    require("search", "optuna", purpose="a search")
    import optuna

    return optuna
