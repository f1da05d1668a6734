"""The search's memory: an Optuna study in a journal file (JSON lines), so that a killed search can be resumed.

Its trials are the candidates. Optuna's own pruner of successive halving is not used: it decides trial by trial, so it
keeps the first trials whatever they score, and it limits no budget. Here a rung is decided when all of it is scored.
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
    """Number of rates drawn for each length."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"`learning_rates` must range from a positive number to a larger one, got {self}")
        if self.draws < 1:
            raise ValueError(f"`draws` must be at least 1, got {self.draws}")

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}:{self.draws}"


class Memory:
    """The study of an output folder, created or opened.

    Args:
        facts: must be the same when a search is resumed; compared with the stored facts.

    Raises:
        ImportError: Optuna is not installed.
        FileNotFoundError: ``resume`` was given, but there is no search.
        FileExistsError: there is a search, and ``resume`` was not given.
        ValueError: the search was started with other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], direction: str, resume: bool) -> None:
        self.optuna = import_optuna()
        journal = folder / JOURNAL
        if resume and not journal.is_file():
            raise FileNotFoundError(f"nothing to resume: {folder} holds no search")
        if not resume and journal.exists():
            raise FileExistsError(f"{journal} already exists; resume the search, or choose another output folder")
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
                f"cannot resume: `{changed}` was {stored.get(changed)!r} when the search started, "
                f"got {facts.get(changed)!r}; choose another output folder"
            )

    def ask(self, lengths: Sequence[int], rates: Sequence[float] | LogRange, seed: int) -> list[dict[str, Any]]:
        """Number, length and learning rate of every candidate, the shortest first. They are drawn once."""
        wanted: list[dict[str, Any]] = []
        for length in lengths:
            if isinstance(rates, LogRange):
                wanted += [{"num_virtual_tokens": length}] * rates.draws
            else:
                wanted += [{"num_virtual_tokens": length, "learning_rate": rate} for rate in rates]
        ends = (rates.low, rates.high) if isinstance(rates, LogRange) else (min(rates), max(rates))
        for number in range(len(self._running()), len(wanted)):
            self.study.sampler = self.optuna.samplers.RandomSampler(
                seed + number
            )  # the same draws after any number of resumptions
            if not self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,)):
                self.study.enqueue_trial(wanted[number])
            trial = self.study.ask()
            trial.suggest_categorical("num_virtual_tokens", list(lengths))
            trial.suggest_float("learning_rate", *ends, log=True)
        candidates = [
            {
                "number": trial.number,
                "num_virtual_tokens": trial.params["num_virtual_tokens"],
                "learning_rate": trial.params["learning_rate"],
            }
            for trial in self._running()
        ]
        return sorted(candidates, key=lambda values: (values["num_virtual_tokens"], values["learning_rate"]))

    def _running(self) -> list[Any]:
        """The trials that have their parameters; a trial that was killed before is left out."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if len(trial.params) == 2]

    def recall(self, number: int | None, key: str) -> Any:
        """The value stored under a key of a trial, or of the search (``number`` None); None: nothing yet."""
        attributes = self.study.user_attrs if number is None else self._frozen(number).user_attrs
        return attributes.get(key)

    def store(self, number: int | None, key: str, value: Any) -> None:
        if number is None:
            self.study.set_user_attr(key, value)
        else:
            self._trial(number).set_user_attr(key, value)

    def report(self, number: int, step: int, score: float) -> None:
        """Stores a candidate's score after so many steps; Optuna's plots read it."""
        if step not in self._frozen(number).intermediate_values:
            self._trial(number).report(score, step)

    def end(self, number: int, *, pruned: bool) -> None:
        """Ends a candidate; its value is the last one reported."""
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
