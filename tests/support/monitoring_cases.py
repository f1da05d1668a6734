"""Synthetic observations, and a profile of them."""

from __future__ import annotations

import base64
import random
import zlib
from typing import Any

from softprompt_fast.evaluation.observations import PROJECTIONS, Observation
from softprompt_fast.evaluation.profile import Profile

LABELS = ("negative", "positive")


def drawn(count: int, seed: int, *, shift: float = 0.0, labels: tuple[str, ...] = LABELS) -> list[Observation]:
    """Rows from one distribution, or from one that is shifted."""
    draw = random.Random(seed)
    return [
        Observation(
            row=f"{seed}-{i}",
            tokens=max(1, round(draw.gauss(25 + 10 * shift, 8))),
            embedding=tuple(round(draw.gauss(shift, 1), 6) for _ in range(PROJECTIONS)),
            new_tokens=round(max(0.0, draw.gauss(0.1 + 0.1 * shift, 0.05)), 6),
            answer=draw.choice(labels) if draw.random() > shift / 2 else labels[0],
            margin=round(draw.betavariate(5, 2 + 3 * shift), 6),
            entropy=round(draw.betavariate(2, 5), 6),
            bare_agrees=draw.random() < 0.7 - 0.3 * shift,
            correct=draw.random() < 0.9 - 0.2 * shift,
        )
        for i in range(count)
    ]


def profile_of(observations: list[Observation], **changes: Any) -> Profile:
    values: dict[str, Any] = {
        "prompt": "movies",
        "digest": "0123",
        "base": "llama-3x32:a:b",
        "kind": "classification",
        "labels": LABELS,
        "source": "held-out rows",
        "observations": tuple(observations),
        "tokens": base64.b64encode(zlib.compress(b"\x0f")).decode(),
    }
    return Profile(**values | changes)
