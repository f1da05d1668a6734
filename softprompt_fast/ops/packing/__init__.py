"""From the packed layout to rows and back, for attention."""

from .functional import pack, unpack

__all__ = ["pack", "unpack"]
