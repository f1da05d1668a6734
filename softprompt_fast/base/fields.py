"""Dataclass fields that describe themselves: a help text, a rule for the values, and how the command line shows them.

One description serves the check in Python and the option on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Which values a field takes."""

    kind: Any
    """Type of a value, as the command line reads it."""
    text: str
    """Follows "must be" in an error."""
    holds: Callable[[Any], bool]
    metavar: str | None = None
    """Shown for a value in the help of the command line; None: the name of the type."""
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Rule:
    return Rule(str, f"one of {', '.join(choices)}", lambda value: value in choices, "|".join(choices), choices)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_integer(value)


ANYTHING = Rule(str, "anything", lambda value: True)
YES_OR_NO = Rule(bool, "True or False", lambda value: isinstance(value, bool))
TEXTS = Rule(list[str], "a list of texts", lambda value: isinstance(value, list))
SEED = Rule(int, "an integer from 0 to 2**32 - 1", lambda value: _is_integer(value) and 0 <= value < 2**32, "int>=0")
POSITIVE_INTEGER = Rule(int, "a positive integer", lambda value: _is_integer(value) and value >= 1, "int>=1")
POSITIVE = Rule(float, "positive and finite", lambda value: _is_number(value) and value > 0, "float>0")
NOT_NEGATIVE_INTEGER = Rule(int, "an integer from 0", lambda value: _is_integer(value) and value >= 0, "int>=0")
NOT_NEGATIVE = Rule(float, "0 or more and finite", lambda value: _is_number(value) and value >= 0, "float>=0")
SHARE = Rule(float, "at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1, "0<=float<1")


@dataclass(frozen=True)
class Description:
    help: str
    rule: Rule
    group: str
    """Heading under which the command line's help shows the field."""
    flags: tuple[str, ...]
    """Names of the option; none: the field's name with dashes."""


def described(help: str, rule: Rule = ANYTHING, *, group: str, flags: tuple[str, ...] = ()) -> dict[str, Description]:
    """The ``metadata`` of a dataclass field. If its default is None, None is allowed whatever the rule says."""
    return {"description": Description(help, rule, group, flags)}


def descriptions(of: Any) -> list[tuple[Field[Any], Description]]:
    """The described fields of a dataclass."""
    return [(one, one.metadata["description"]) for one in fields(of) if "description" in one.metadata]


def check_fields(values: Any) -> None:
    """Checks a dataclass instance by the rules of its described fields.

    Raises:
        ValueError: with the field, the rule and the value.
    """
    for one, description in descriptions(values):
        value = getattr(values, one.name)
        if value is None and one.default is None:
            continue
        if not description.rule.holds(value):
            text = f"{description.rule.text}{' or None' if one.default is None else ''}"
            raise ValueError(f"`{one.name}` must be {text}, got {value!r}")
