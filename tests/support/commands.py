"""The commands of the command line."""

from __future__ import annotations

from typing import Any


def every_command(group: Any, prefix: str = "") -> dict[str, Any]:
    """All commands by their names; those of a group by two words, such as "versions add"."""
    found = {}
    for name, command in group.commands.items():
        found[f"{prefix}{name}"] = command
        if hasattr(command, "commands"):
            found |= every_command(command, f"{prefix}{name} ")
    return found
