"""Values of a table's cells: which are missing, how they read as text, and which label they name."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import numbers
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")
"""A number as text. Texts with leading zeros (007) are no numbers: they are names."""
WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))\.0*")
BOOLEANS = ("true", "false")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names of roles in other programs, and what chat templates call them."""
SHOWN = 60
"""Characters of a value that a message shows."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, NaT, pandas.NA, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, str):
        return is_blank(value)
    if isinstance(value, numbers.Number):
        return value != value
    kind = type(value).__name__
    if kind in ("datetime64", "timedelta64"):  # of numpy
        return bool(value != value)
    return kind in ("NaTType", "NAType")


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only white space, control and formatting characters (zero width)."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def scalar(value: Any) -> Any:
    """A numpy scalar as Python's own value; other values as they are. float32 keeps its short form (0.1)."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return float(str(value)) if getattr(value.dtype, "kind", "") == "f" else value.item()
    return value


def plain(value: Any) -> Any:
    """A value as strict JSON holds it.

    NaN and other missing values become null, infinite numbers their text, dates ISO 8601, decimal numbers their digits,
    bytes base64.
    """
    value = scalar(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if is_missing(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    try:
        return text_of(value, "")
    except ValueError:
        return str(value)


def shown(value: Any) -> str:
    """A value for messages, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def text_of(value: Any, column: str) -> str:
    """A cell as text: text as it is, numbers in their shortest form, booleans as true and false, dates by ISO 8601.

    A missing value is an empty text.

    Raises:
        ValueError: a list, a mapping, bytes or another value that has no one text; or half a surrogate pair.
    """
    value = scalar(value)
    if is_missing(value):
        return ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(
                f"column {column!r} must hold valid Unicode text, got half a surrogate pair in {shown(value)}"
            )
        return value
    if isinstance(value, bool):
        return BOOLEANS[0] if value else BOOLEANS[1]
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    if isinstance(value, numbers.Number):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    raise ValueError(f"column {column!r} must hold text, got {type(value).__name__} {shown(value)}")


def label_name(value: Any, column: str) -> str:
    """The name of a label: numbers that are whole have no decimals (1.0 is "1"), and all else is as in ``text_of``.

    Raises:
        ValueError: a list or another value that is not one label.
    """
    value = scalar(value)
    number = isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool)
    if number and math.isfinite(value) and value == int(value):
        return str(int(value))
    try:
        return text_of(value, column)
    except ValueError as error:
        if isinstance(value, str):
            raise
        raise ValueError(
            f"column {column!r} must hold one label in each row, got {type(value).__name__} {shown(value)}"
        ) from error


def label_names(names: Collection[str]) -> list[str]:
    """The different labels among names, sorted. Spellings of one whole number (1 and 1.0) are one label."""
    return sorted(name for name in set(names) if not ((whole := WHOLE.fullmatch(name)) and whole[1] in names))


def matching_label(name: str, labels: Collection[str]) -> str | None:
    """The label that a name means: the same text, or the only label of the same number or boolean."""
    if name in labels:
        return name
    key = _key(name)
    if key is None:
        return None
    found = [label for label in labels if _key(label) == key]
    return found[0] if len(found) == 1 else None


def _key(name: str) -> object | None:
    """What spellings of one number or boolean have in common; None for other texts."""
    if name.lower() in BOOLEANS:
        return name.lower()
    return decimal.Decimal(name) if NUMBER.fullmatch(name) else None


def messages_of(value: Any) -> list[dict[str, str]] | None:
    """The turns of a conversation, as ``role`` and ``content``; None for a value that is no conversation.

    Reads ``role`` and ``content`` (messages), and ``from`` and ``value`` (conversations).
    """
    if not isinstance(value, (list, tuple)) or not value:
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, (list, tuple)) and all(
            isinstance(p, Mapping) and p.get("type") == "text" for p in content
        ):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append({"role": ROLES.get(role, role), "content": content})
    return turns
