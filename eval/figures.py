"""Write figures as a reader needs them: values, p-values, times, and shares of a width."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MINUS = "−"
NOTHING = "–"
SPACE = "\N{NO-BREAK SPACE}"


def number(value: float | None, unit: str = "", signed: bool = False) -> str:
    """Write a figure with the digits a reader needs; a share becomes percent, its difference points."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = 100 * abs(value) if unit == "share" else abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{size:,.0f}"
    elif unit == "share" or size >= 10:
        text = f"{size:.1f}"
    else:
        text = f"{size:.3f}" if size == 0 or size >= 0.01 else f"{size:.2g}"
    if not re.search("[1-9]", text):  # what rounds to nothing has no sign
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def spoken(value: float | None, unit: str) -> str:
    """Write a value as it stands inside a sentence: a share in whole percent."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{100 * value:.0f}{SPACE}%" if unit == "share" else number(value)


def spoken_change(value: float, unit: str) -> str:
    """Write a difference with its sign and unit: that of two shares in points, whole ones where they are many."""
    text = number(value, unit, signed=True)
    if unit == "share" and abs(value) >= 0.1:
        text = f"{MINUS if value < 0 else '+'}{100 * abs(value):.0f}"
    return f"{text}{SPACE}{'points' if unit == 'share' else unit}".strip()


def p_value(value: float | None) -> str:
    """Write a p-value without digits that mean nothing."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Write a time as a person would say it."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return the ends and steps of a scale in round numbers that holds both bounds, with at most so many steps."""
    width = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(width / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def percent_of(value: float, ends: Sequence[float]) -> float:
    """Return where a value lies between the first and the last of these, in percent of their distance."""
    return round(100 * (value - ends[0]) / ((ends[-1] - ends[0]) or 1.0), 2)
