"""From the packed layout to rows and back, for attention."""

from .functional import RowTable, pack, unpack

__all__ = ["RowTable", "pack", "unpack"]
