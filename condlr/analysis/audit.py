"""The audit of a network's accuracy under attack, as an analysis."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.strengths import as_printed
from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.sceptic.masking import CHECKS, IMAGES, Audit
from condlr.evaluation import first


@dataclass
class AttackAudit(Analysis):
    """Whether the accuracy at the attack's largest strength is reliable, see `Audit`.

    Attributes:
        images: the first N test images; None for as many as the attack uses, or 1000.
    """

    title: ClassVar[str] = "Audit of the attacks"
    keys: ClassVar[tuple[str, ...]] = ("norm", "eps", "n", "attack_seed", "check")
    columns: ClassVar[Mapping[str, str]] = {
        "status": "{status}", "check": "{check}", "found": "{found}", "meaning": "{meaning}"
    }  # fmt: skip
    layout: ClassVar[Layout] = "checks"

    images: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)

    @override
    def require(self, trained: Trained) -> None:
        self._audit(trained)

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        audit, count = self._audit(trained), self._count(trained)
        asked = (audit.norm, as_printed(audit.eps), count, audit.seed)
        found = [row for row in there if _strength(row) == asked]
        left_out = any(row["check"] == "transfer" and row["status"] == "not done" for row in found)
        return len(found) < len(CHECKS) or (left_out and trained.has_dense)

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        audit, count = self._audit(trained), self._count(trained)
        images = first(trained.data.test, count)
        for check in audit.checks(trained.model, images, trained.dense, trained.on_progress):
            yield {
                "norm": audit.norm, "eps": audit.eps, "n": count, "attack_seed": audit.seed,
                "check": check.name, "status": check.status, "value": check.value, "limit": check.limit,
                "found": check.found, "meaning": check.meaning,
            }  # fmt: skip

    def _audit(self, trained: Trained) -> Audit:
        attack = trained.attack
        return Audit(max(attack.eps), attack.norm, seed=attack.seed)

    def _count(self, trained: Trained) -> int:
        return min(self.images or trained.attack.images or IMAGES, trained.test_images)


def _strength(row: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return row["norm"], as_printed(float(row["eps"])), int(float(row["n"])), int(float(row["attack_seed"]))
