"""PEFT's adapters (LoRA and others) inside the layers of a model: their parameters, and which of them run."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn

SWITCHES = ("_active_adapter", "scaling", "merged_adapters")
NAMES = "adapter_layer_names"
"""Attribute of PEFT's layers: the names of the mappings from an adapter to its part of the layer."""
ADAPTION_PROMPT = ("adaption_prompt", "adaption_gate")
"""Parameters of the one kind of adapter whose layers have no such attribute."""
NOT_IN_LAYERS = {"XLORA": "mixes adapters", "POLY": "needs the task of each row"}
"""PEFT's types whose work is done outside the layers, so that the base model alone would leave it out."""


def adapter_state(module: Any) -> list[str]:
    """Which adapters a module runs, and how strongly; empty: it has none.

    No weight and no module changes when PEFT switches adapters.
    """
    own = vars(module)
    if "_disable_adapters" not in own:
        return []
    return [repr(own["_disable_adapters"]), *(repr(own.get(name)) for name in SWITCHES)]


def adapter_parameters(model: nn.Module, *, running: bool = False) -> Iterator[nn.Parameter]:
    """The parameters of all adapters of a model; those of prompts of PEFT are not among them.

    Args:
        running: only of adapters that change the results of their layer now: active, not disabled and not merged.
    """
    for module in model.modules():
        own = vars(module).get("_parameters", {})
        yield from (own[name] for name in ADAPTION_PROMPT if isinstance(own.get(name), nn.Parameter))
        for names in getattr(module, NAMES, ()):
            try:
                parts = attrgetter(names)(module)
            except AttributeError:  # PEFT makes some of them only when they are needed
                continue
            for adapter, part in parts.items():
                if running and not _runs(module, adapter):
                    continue
                yield from part.parameters() if isinstance(part, nn.Module) else [part]


def _runs(module: Any, adapter: str) -> bool:
    merged = getattr(module, "merged_adapters", None) or ()
    return not module.disable_adapters and adapter in module.active_adapters and adapter not in merged


def reason_against(model: Any) -> str | None:
    """Why the adapters of a PEFT model cannot run with prompts; None: they can."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(config, "peft_type", None)
        kind = str(getattr(kind, "value", kind))
        if kind in NOT_IN_LAYERS:
            return f"its {kind} adapter {name!r} {NOT_IN_LAYERS[kind]} outside of its layers"
        if getattr(config, "alora_invocation_tokens", None):
            return f"its adapter {name!r} (activated LoRA) begins at tokens that it looks for in the input ids"
    return None
