"""JSON lines: logs of answers and histories of reports. Lines that a crash has torn are left out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from ..evaluation.profile import Profile

logger = logging.getLogger("softprompt_fast")

HISTORY_FILE = "history.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file. Lines that hold none are left out with a warning.

    Raises:
        OSError: no such file.
    """
    found, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if isinstance(values, dict):
            found.append(values)
        else:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (" and others" if len(bad) > 5 else "")
        logger.warning("%s: %d of its lines are torn and left out (line %s)", path, len(bad), shown)
    return found


def read_log(path: Path, profile: Profile) -> list[dict[str, Any]]:
    """The lines of a prompt in a log of :class:`AnswerLog`. Those of other prompts are left out with a warning.

    Raises:
        OSError: no such file.
        ValueError: no line of this prompt.
    """
    own, others = [], Counter[tuple[str, str]]()
    for line in read_lines(path):
        if line.get("digest") == profile.digest:
            own.append(line)
        else:
            others[str(line.get("prompt")), str(line.get("digest"))] += 1
    shown = ", ".join(f"{count} rows of {name!r} ({digest})" for (name, digest), count in others.most_common(3))
    if not own:
        raise ValueError(
            f"{path}: the log must hold rows of prompt {profile.prompt!r} ({profile.digest}), got {shown or 'none'}; "
            "softprompt-fast predict --log writes it"
        )
    if others:
        logger.warning("%s: %s are left out", path, shown)
    return own


def read_history(folder: Path, digest: str) -> list[dict[str, Any]]:
    """The earlier reports on a prompt, in the order in which they were written."""
    path = folder / HISTORY_FILE
    lines = read_lines(path) if path.is_file() else []
    return [line for line in lines if line.get("digest") == digest and {"time", "tests", "rows"} <= set(line)]
