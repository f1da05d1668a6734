"""Numbers in a readable form."""

from __future__ import annotations


def size(value: float | None) -> str:
    """A number of bytes."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"), " ")


def count(value: float | None) -> str:
    """A number of parameters or operations."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P"), " ")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.1f} s" if value >= 1 or value == 0 else f"{value:.2g} s"


def p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _scaled(value: float | None, base: float, units: tuple[str, ...], gap: str) -> str:
    if value is None:
        return ""
    place = 0
    while abs(value) >= base and place < len(units) - 1:
        value, place = value / base, place + 1
    unit = units[place]
    digits = 0 if place == 0 or abs(value) >= 100 else 1
    return f"{value:.{digits}f}{gap if unit else ''}{unit}"
