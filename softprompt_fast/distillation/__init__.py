"""Compression of a long text into a few virtual tokens, by distillation without labels."""

from typing import TYPE_CHECKING

from ..base.lazy import lazy_names

if TYPE_CHECKING:
    from .figure import retention_figure
    from .page import write_page
    from .result import CompressedPrompt, Compression
    from .retention import Retention
    from .run import compress
    from .settings import DistillationSettings
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "CompressedPrompt": ".result",
            "Compression": ".result",
            "DistillationSettings": ".settings",
            "Retention": ".retention",
            "compress": ".run",
            "retention_figure": ".figure",
            "write_page": ".page",
        },
    )

__all__ = [
    "CompressedPrompt",
    "Compression",
    "DistillationSettings",
    "Retention",
    "compress",
    "retention_figure",
    "write_page",
]
