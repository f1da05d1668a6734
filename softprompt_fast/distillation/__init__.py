"""Compression of a long text into a few virtual tokens, by distillation without labels."""

from typing import TYPE_CHECKING

from ..base.lazy import lazy_names

if TYPE_CHECKING:
    from .documents import DocumentCompression, DocumentPrompt, compress_documents
    from .figure import retention_figure
    from .joining import join_prompts
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
            "DocumentCompression": ".documents",
            "DocumentPrompt": ".documents",
            "Retention": ".retention",
            "compress": ".run",
            "compress_documents": ".documents",
            "join_prompts": ".joining",
            "retention_figure": ".figure",
            "write_page": ".page",
        },
    )

__all__ = [
    "CompressedPrompt",
    "Compression",
    "DistillationSettings",
    "DocumentCompression",
    "DocumentPrompt",
    "Retention",
    "compress",
    "compress_documents",
    "join_prompts",
    "retention_figure",
    "write_page",
]
