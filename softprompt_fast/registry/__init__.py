"""Versions of prompts in MLflow's model registry: names, aliases, differences, promotion and rollback.

Needs the extra ``production``.
"""

from typing import TYPE_CHECKING

from ..base.lazy import lazy_names

if TYPE_CHECKING:
    from .difference import ChangedAnswer, Distance, VersionDifference
    from .history import Move
    from .prompt_registry import PromptRegistry, PromptVersion
    from .record import Record
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "ChangedAnswer": ".difference",
            "Distance": ".difference",
            "Move": ".history",
            "PromptRegistry": ".prompt_registry",
            "PromptVersion": ".prompt_registry",
            "Record": ".record",
            "VersionDifference": ".difference",
        },
    )

__all__ = [
    "ChangedAnswer",
    "Distance",
    "Move",
    "PromptRegistry",
    "PromptVersion",
    "Record",
    "VersionDifference",
]
