"""Templates: texts with the names of columns in braces."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Between braces everything is the column's name, whatever it holds; a backslash stands before a brace of the name.
PARTS = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<name>(?:\\[\\{}]|[^{}])*)\}|(?P<single>[{}])", re.DOTALL)
ESCAPED = re.compile(r"\\([\\{}])")
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def parse(template: str) -> list[tuple[str, str | None]]:
    """The parts of a template: a literal text and the column after it; None after the last text.

    Raises:
        ValueError: a brace that neither encloses a column nor is doubled, or no name between braces.
    """
    parts: list[tuple[str, str | None]] = []
    literal, at = "", 0
    for match in PARTS.finditer(template):
        literal += template[at : match.start()]
        at = match.end()
        if match["open"] or match["close"]:
            literal += match[0][0]
        elif match["single"] or not match["name"]:
            raise ValueError(
                f"`template` must have columns in braces, and other braces doubled ({{{{ and }}}}), got {template!r}: "
                f"{match[0]!r} at character {match.start() + 1}"
            )
        else:
            parts.append((literal, ESCAPED.sub(r"\1", match["name"])))
            literal = ""
    return [*parts, (literal + template[at:], None)]


def columns(template: str) -> list[str]:
    """The columns that a template names, each once."""
    return list(dict.fromkeys(name for _, name in parse(template) if name is not None))


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with each column's text."""
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parse(template))


def field(column: str) -> str:
    """A column as a template names it."""
    escaped = re.sub(r"[{}]|\\(?=[\\{}]|$)", lambda match: "\\" + match[0], column)
    return f"{{{escaped}}}"


def unescaped(text: str) -> str:
    r"""A template from the command line: ``\n``, ``\t`` and ``\\`` are a line break, a tab and a backslash.

    Other backslashes stay, among them those in front of braces.
    """
    return re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], text)
