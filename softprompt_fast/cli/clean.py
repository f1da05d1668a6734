"""``clean``: removes cached builds."""

from __future__ import annotations


def clean() -> None:
    """Removes cached builds of the extension."""
    from ..ops.extension.build import cache_directory
    from ..ops.extension.build import clean as remove_builds

    removed = remove_builds()
    print(f"removed {len(removed)} entries from {cache_directory() / 'build'}")
