"""What an audit finds: one check each."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Status = Literal["pass", "note", "warning", "not done"]

# Fewer images than this are chance.
_FEW = 3


@dataclass(frozen=True)
class Check:
    """One finding of an audit.

    Attributes:
        name: of the check.
        status: `pass`; `warning`, where an accuracy is shown to be too high; `note`, where weaker attacks
            than ours would be misled; or `not done`.
        value, limit: what was measured and what it was held against; `found` says in which sense.
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
    """A check that passes unless `value` is above `limit`, by at least a few of n images, or is no number."""
    # Shares are counts / n: what is equal but for rounding is equal.
    status: Status = "pass" if value <= limit + 1e-9 or value * n < _FEW - 1e-6 else above
    return Check(name, status, value, limit, found, meaning)


def not_done(name: str, why: str, meaning: str) -> Check:
    """A check that could not be made."""
    return Check(name, "not done", math.nan, math.nan, why, meaning)


def share_of(which: Tensor) -> float:
    """The part of (n,) bool that is true."""
    return which.double().mean().item()
