"""The reference profile of a prompt: observations of held-out rows, which monitoring compares new rows with.

``profile.json`` is in the prompt's folder, beside ``task.json``. It holds no text: each row is a digest of its text and
a few numbers, and the tokens that the rows have are a bitmap of the vocabulary.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from ..base.files import write_atomically
from ..hf.architecture import is_encoder_decoder
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.base_identity import base_fingerprint
from ..prompts.peft_files import WEIGHTS_FILE
from ..tasks.containers import as_rows
from ..tasks.cuts import counting_cuts
from ..tasks.encoding import encode_text
from ..tasks.examples import Examples, is_empty
from ..tasks.rows import choose
from ..tasks.task import Task
from .likelihood import Progress
from .observations import DIGITS, Observation, observe

PROFILE_FILE = "profile.json"
VERSION = 1
"""Version of the file. It changes when what an observation measures changes."""
PROFILE_ROWS = 1000
"""Most rows of a profile. More held-out rows are sampled, which bounds the time, the file and the memory."""


@dataclass(frozen=True)
class Profile:
    """Observations of the rows that a prompt is expected to see, and what they belong to."""

    prompt: str
    """The prompt's name."""
    digest: str
    """See :func:`prompt_digest`."""
    base: str
    """Fingerprint of the base model."""
    kind: str
    """"classification" or "generation"."""
    labels: tuple[str, ...]
    """The task's labels; empty for a generation task."""
    source: str
    """Where the rows come from, in words."""
    observations: tuple[Observation, ...]
    """At most :data:`PROFILE_ROWS`; rows with equal texts are kept."""
    tokens: str
    """The bitmap of token ids that the rows have: zlib, then base64."""

    @cached_property
    def known_tokens(self) -> frozenset[int]:
        """Ids of the tokens that the rows have."""
        bits = np.unpackbits(
            np.frombuffer(zlib.decompress(base64.b64decode(self.tokens, validate=True)), dtype=np.uint8)
        )
        return frozenset(np.flatnonzero(bits).tolist())

    @cached_property
    def tokens_digest(self) -> str:
        """Tells whether ``new_tokens`` of a log was measured with this profile's tokens."""
        return hashlib.sha256(self.tokens.encode()).hexdigest()[:16]

    def save(self, folder: PathLike[str] | str) -> Path:
        """Writes ``profile.json`` into a folder. Equal profiles give equal bytes."""
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "observations"}
        columns = {
            f"rows.{one.name}": [getattr(row, one.name) for row in self.observations] for one in fields(Observation)
        }
        lines = [
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}"
            for key, value in ({"version": VERSION} | facts | columns).items()
        ]
        path = Path(folder) / PROFILE_FILE
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return path

    @classmethod
    def load(cls, folder: PathLike[str] | str) -> Profile:
        """The profile in a prompt's folder, or a profile's own file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, or another version of this package wrote it.
        """
        path = Path(folder)
        path = path / PROFILE_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.parent} has no {PROFILE_FILE}, which training records; give reference rows "
                "(--reference), or record a profile with them (record_profile, --reference with --record)"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a profile, or it is damaged; record it again with --reference") from error
        if version != VERSION:
            raise ValueError(
                f"{path}: the version of a profile must be {VERSION}, got {version!r}; record it again with --reference"
            )
        try:
            columns = [values.pop(f"rows.{one.name}") for one in fields(Observation)]
            names = [one.name for one in fields(Observation)]
            rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            observations = tuple(map(Observation.from_json, rows))
            profile = cls(**values | {"labels": tuple(values["labels"]), "observations": observations})
            _ = profile.known_tokens
        except (ValueError, KeyError, AttributeError, TypeError, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}); record it again with --reference") from error
        return profile


def prompt_digest(folder: PathLike[str] | str, task: Task) -> str:
    """A short text that is equal for prompts that answer alike: equal numbers, and a task with equal rules.

    The prompt's name and the base model's name do not count.
    """
    rules = {key: value for key, value in task.to_json().items() if key not in ("model", "prompt")}
    content = hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode())
    for key, tensor in sorted(load_file(Path(folder) / WEIGHTS_FILE).items()):
        content.update(f"{key} {tuple(tensor.shape)} ".encode())
        content.update(tensor.float().numpy().tobytes())
    return content.hexdigest()[:16]


def record_profile(
    model: SoftPromptModel,
    tokenizer: Any,
    task: Task,
    rows: Examples,
    folder: PathLike[str] | str,
    *,
    source: str = "reference rows",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Profile:
    """Observes the rows that a prompt is expected to see. :meth:`Profile.save` writes the result.

    Args:
        model: holds the prompt under the task's name.
        rows: not those that the prompt was trained on: the model is surer of them than of new ones. Rows without text
            are left out, and more than :data:`PROFILE_ROWS` are sampled.
        folder: the prompt's folder.
        source: where the rows come from, in words.
        progress: see :func:`observe`.

    Raises:
        ValueError: no row has text.
    """
    rows = as_rows(rows)
    filled = [i for i, row in enumerate(rows) if not is_empty(task, row)]
    if not filled:
        raise ValueError(f"`rows` must hold rows with text, got none among {len(rows)}")
    if len(filled) > PROFILE_ROWS:
        filled = sorted(random.Random(0).sample(filled, PROFILE_ROWS))
    chosen = choose(rows, filled)
    seen = observe(model, tokenizer, task, chosen, batch_size=batch_size, progress=progress)
    with counting_cuts(log=False):
        encoder_decoder = is_encoder_decoder(model.base_model)
        texts = [encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder) for row in chosen]
    observations, known = _with_new_tokens(seen, texts, tokenizer.unk_token_id)
    bits = np.zeros(max(known, default=0) + 1, dtype=np.uint8)
    bits[list(known)] = 1
    return Profile(
        prompt=task.prompt,
        digest=prompt_digest(folder, task),
        base=base_fingerprint(model.base_model),
        kind=task.kind,
        labels=tuple(task.labels),
        source=source,
        observations=tuple(observations),
        tokens=base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode(),
    )


def _with_new_tokens(
    seen: list[Observation], texts: list[list[int]], unknown: int | None
) -> tuple[list[Observation], set[int]]:
    """The observations with ``new_tokens``, and the tokens that any row has.

    A row of the reference is compared with the other rows, as a new row is compared with all. Rows with equal texts
    count once, else each would know the other's tokens.
    """
    distinct = {one.row: set(text) for one, text in zip(seen, texts, strict=True)}
    rows_with = Counter(token for tokens in distinct.values() for token in tokens)
    rows_with.pop(unknown, None)  # type: ignore[arg-type]
    found = [
        replace(one, new_tokens=round(sum(rows_with[token] < 2 for token in text) / len(text), DIGITS))
        for one, text in zip(seen, texts, strict=True)
    ]
    return found, set(rows_with)
