"""Numbers in sentences."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rate(value: float) -> str:
    """Three digits, or whole thousands, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
