"""From the packed layout to rows and back: what attention needs of it."""

from .functional import pack, unpack

__all__ = ["pack", "unpack"]
