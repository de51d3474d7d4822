"""Numbers and long values as text for people."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for a table, with a true minus sign; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def shorten(value: object, length: int = 60, end: str = "...") -> str:
    """A value as text, cut to ``length`` characters including ``end``."""
    text = str(value)
    return text if len(text) <= length else text[: length - len(end)].rstrip() + end
