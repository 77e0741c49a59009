"""The findings of an audit."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Status = Literal["pass", "note", "warning", "not done"]

# Fewer images than this count as chance.
_FEW = 3


@dataclass(frozen=True)
class Check:
    """One finding of an audit.

    Attributes:
        name: of the check.
        status: `pass`; `warning` if an accuracy is shown to be too high; `note` if weaker attacks than ours
            would be misled; or `not done`.
        value, limit: the measured value and its limit; `found` explains them.
        found: the figures, in words.
        meaning: what a warning or a note means.
    """

    name: str
    status: Status
    value: float
    limit: float
    found: str
    meaning: str


def at_most(
    name: str, value: float, limit: float, n: int, found: str, meaning: str, above: Status = "warning"
) -> Check:
    """A check that passes unless `value` is NaN, or above `limit` and at least a few of n images."""
    # Shares are counts / n, so differences by rounding count as equal.
    status: Status = "pass" if value <= limit + 1e-9 or value * n < _FEW - 1e-6 else above
    return Check(name, status, value, limit, found, meaning)


def not_done(name: str, why: str, meaning: str) -> Check:
    """A check that could not be made."""
    return Check(name, "not done", math.nan, math.nan, why, meaning)


def share_of(which: Tensor) -> float:
    """The fraction of (n,) bool that is true."""
    return which.double().mean().item()
