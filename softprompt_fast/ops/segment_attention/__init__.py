"""Attention of many segments in one pass."""

from .functional import cached_attention, segment_attention

__all__ = ["cached_attention", "segment_attention"]
