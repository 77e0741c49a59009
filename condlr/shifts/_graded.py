"""Shifts that make several changes, each at severities 1 to 5."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from condlr._support.errors import one_of
from condlr.shifts.base import Shift, ShiftedSet

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass
class Graded(Shift):
    """A set for each kind of change and each severity.

    Attributes:
        known: all kinds.
        kinds: some of them.
        severities: from 1 to 5.
    """

    known: ClassVar[tuple[str, ...]]

    kinds: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [*SEVERITIES])

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            one_of("kinds", kind, self.known)
        for severity in self.severities:
            one_of("severities", severity, SEVERITIES)
        for name in ("kinds", "severities"):
            values = getattr(self, name)
            if not values or len({*values}) < len(values):
                raise ValueError(f"{name} must name at least one, and each once; got {values}")

    @override
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        n = self.count(test_images)
        return [ShiftedSet(kind, severity, n) for kind in self.kinds for severity in self.severities]
