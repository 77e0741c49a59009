"""Strengths of attacks: how they are written, and which of them are equal."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from condlr._support.errors import in_range


def strengths(values: Any) -> Any:
    """One strength or several as a list of numbers; a fraction such as `8/255` is a number, too.

    A value of another type is returned unchanged, and fails the check of types later.

    Raises:
        ValueError: a text is not a number; a mapping.
    """
    if isinstance(values, Mapping):
        raise ValueError(f"eps must be numbers, or fractions such as 8/255; got {dict(values)}")
    if isinstance(values, str | int | float):
        values = [values]
    if not isinstance(values, list):
        return values
    return [_number(value) if isinstance(value, str) else value for value in values]


def _number(text: str) -> float:
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps must be numbers, or fractions such as 8/255; got {text!r}") from None


def require_pixels(eps: float) -> None:
    """Raise `ValueError` for a strength in the maximum norm that is in levels of 255 instead of [0, 1]."""
    if isinstance(eps, int | float) and 1 < eps <= 255:
        raise ValueError(
            f"eps must be in [0, 1], as pixels are; got {eps:g}: of 255 levels that is {eps:g}/255"
        )


def pixel_strengths(values: Any) -> list[float]:
    """The `distinct` strengths in the maximum norm that `strengths` reads.

    Raises:
        ValueError: there is none, or one is outside of [0, 1].
    """
    read = strengths(values)
    if not isinstance(read, list) or not read:
        raise ValueError("eps is empty: name at least one strength")
    for eps in read:
        require_pixels(eps)
        in_range("eps", eps, 0, 1)
    return distinct(read)


def as_printed(eps: float) -> float:
    """The strength rounded to the six significant digits of tables.

    Strengths that print alike are equal: 8/255, 0.03137254901960784 and 0.0313725.
    """
    return float(f"{eps:.6g}") if math.isfinite(eps) else eps


def distinct(values: Iterable[float]) -> list[float]:
    """The strengths in ascending order; of those that print alike only one."""
    return [*{as_printed(value): value for value in sorted(values)}.values()]
