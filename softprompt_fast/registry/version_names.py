"""The names of versions: ``sentiment@7``, ``sentiment@production``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..base.locations import VERSION_NAME
from ..prompts.fast_soft_prompt import check_name

LATEST = "latest"
"""Stands for the newest version of a name; MLflow keeps this alias for itself."""
PRODUCTION = "production"
"""The alias of the version that answers, unless another one is named."""


def parse(text: str) -> tuple[str, str]:
    """The name and the number or alias that a text such as ``sentiment@7`` gives.

    Raises:
        ValueError: it gives none.
    """
    match = VERSION_NAME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"a version must be NAME@NUMBER or NAME@ALIAS, such as sentiment@7 or sentiment@production, got {text!r}"
        )
    return match[1], match[2]


def check_registered_name(name: str) -> None:
    """Refuses names that cannot be part of the name of a version.

    Raises:
        ValueError: naming the rule.
    """
    try:
        check_name(name)
    except (TypeError, ValueError):
        raise ValueError(f"a registered name must be letters, digits, '_' and '-', got {name!r}") from None


def check_alias(alias: str) -> None:
    """Refuses aliases that are numbers of versions, or that MLflow keeps for itself.

    Raises:
        ValueError: naming the rule.
    """
    number = alias[1:] if alias[:1] in ("v", "V") else alias
    if VERSION_NAME.fullmatch(f"name@{alias}") is None or number.isdigit() or alias.lower() == LATEST:
        raise ValueError(
            "an alias must be letters, digits, '_' and '-', and not a number, such as 7 or v7, or 'latest', "
            f"got {alias!r}"
        )


def closest(wanted: str, known: Iterable[str]) -> str:
    """A question after an unknown name: the most similar known one; an empty text if none is similar."""
    near = difflib.get_close_matches(wanted, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
