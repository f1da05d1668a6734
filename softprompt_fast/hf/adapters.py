"""What PEFT keeps in Python about the adapters of a module: no weight and no module changes when they are switched."""

from __future__ import annotations

from typing import Any

SWITCHES = ("_active_adapter", "scaling", "merged_adapters")


def adapter_state(module: Any) -> list[str]:
    """Which adapters a module runs, and how strongly; empty: it has none."""
    own = vars(module)
    if "_disable_adapters" not in own:
        return []
    return [repr(own["_disable_adapters"]), *(repr(own.get(name)) for name in SWITCHES)]
