"""Numbers as tables and texts print them."""

import math
from typing import Any


def shown(value: Any) -> str:
    """A value in a table: counts with commas, other numbers to three digits, a dash for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "∞"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e9 else f"{value:.3g}"


def accuracy(fraction: float | None, std: float = float("nan")) -> str:
    """An accuracy in percent, with ± its standard deviation if it has one; a dash for none."""
    spread = "" if math.isnan(std) else f" ±{100 * std:.2f}"
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}{spread}"


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points; never -0.00."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


def rounded(fraction: float) -> str:
    """A measured compression in percent; never -0.0."""
    return f"{round(100 * fraction, 1) + 0.0:.1f}"


def condition(value: float) -> str:
    """A condition number, to three digits."""
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `7 min 10 s`, `3 h 20 min`, `5 days 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    days, hours = divmod(whole // 3600, 24)
    return f"{days} {'day' if days == 1 else 'days'} {hours} h"
