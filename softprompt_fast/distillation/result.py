"""The result of a compression, and the file that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.files import write_json
from ..prompts.run_files import RETENTION_FILE
from .retention import NOTHING, Retention
from .settings import DistillationSettings

PREFIX_CACHE = 300
"""Tokens of a text below which a server's prefix cache saves about as much."""


@dataclass(frozen=True)
class CompressedPrompt:
    """One prompt of a compression."""

    folder: Path
    """A prompt folder with its ``task.json``."""
    tokens: int
    init: str
    """The initial values that were used."""
    init_losses: dict[str, float]
    """Loss of each kind of initial values that was measured; empty if one was given."""
    learning_rate: float
    retention: Retention
    loss: float
    """Mean training loss of the last tenth of the steps."""
    training_seconds: float
    file_bytes: int
    """Size of the folder."""
    cache_bytes: int
    """Keys and values of its positions in the model's dtype, as serving holds them."""
    first_token_seconds: float
    """Median time until the first token of one request."""
    break_even_requests: int | None
    """Requests after which the time saved is the time spent on teacher and training; None: no time is saved."""
    weights_sha256: str | None = None
    """Digest of the folder's weights: a prompt that is saved again with other values has other results."""


@dataclass(frozen=True)
class Compression:
    """The result of :func:`compress`."""

    prompts: list[CompressedPrompt]
    """One for each number of tokens, in ascending order."""
    recommended: CompressedPrompt
    """The smallest one whose agreement is at most ``max_drop`` below the best one's."""
    references: list[Retention]
    """The whole text, nothing, and for each number of tokens the text cut to it and its mean-pooled parts."""
    text_tokens: int
    text_cache_bytes: int
    """Keys and values of the whole text."""
    text_first_token_seconds: float
    """Median time until the first token of one request that runs the whole text."""
    compiled_first_token_seconds: float
    """The same where a server keeps the whole text's keys and values."""
    training_queries: int
    held_out_queries: int
    free_queries: int
    """Held-out queries after which free continuations were compared."""
    teacher_seconds: float
    max_drop: float
    settings: DistillationSettings

    def to_json(self) -> dict[str, Any]:
        """All numbers; folders as texts."""
        values = asdict(self)
        for prompt in (*values["prompts"], values["recommended"]):
            prompt["folder"] = str(prompt["folder"])
        values["settings"]["init"] = str(values["settings"]["init"])
        return values

    def write(self, folder: Path) -> None:
        write_json(folder / RETENTION_FILE, self.to_json())

    @property
    def retains_nothing(self) -> bool:
        """Whether the model without the text is as close to the teacher as the recommended prompt."""
        nothing = next(one for one in self.references if one.label == NOTHING)
        return self.recommended.retention.kl >= nothing.kl

    @property
    def notes(self) -> list[str]:
        """What to know before a prompt is used."""
        notes = []
        if self.text_tokens < PREFIX_CACHE:
            notes.append(
                f"The text has {self.text_tokens} tokens. Below {PREFIX_CACHE}, a server with a prefix cache answers "
                "about as fast with the whole text."
            )
        if self.retains_nothing:
            notes.append(
                "The prompt retains nothing: the model without the text is as close. Train on more queries or steps."
            )
        return notes


def recommend(prompts: Sequence[CompressedPrompt], max_drop: float) -> CompressedPrompt:
    """The smallest prompt whose agreement is at most `max_drop` below the best one's."""
    best = max(prompt.retention.agreement for prompt in prompts)
    return min(
        (prompt for prompt in prompts if prompt.retention.agreement >= best - max_drop),
        key=lambda prompt: prompt.tokens,
    )
