"""Accuracy on the images that were held out from training: what weights and ranks are chosen by."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.strengths import as_printed, pixel_strengths
from condlr.analysis.base import Analysis, Trained
from condlr.attacks.base import Attack
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.pgd import Pgd
from condlr.evaluation import evaluate


@dataclass
class HeldOut(Analysis):
    """Accuracy on held-out images without an attack, under FGSM and under PGD in the maximum norm.

    A choice by them leaves the test images for the comparison of what was chosen.

    Attributes:
        eps: strengths; null: the largest one of the run's attack.
        steps: of PGD, with the margin loss.
        images: the first N held-out images; null: all.
    """

    title: ClassVar[str] = "Accuracy on held-out images"
    legend: ClassVar[str] = "These images were used neither for training nor for the tables of attacks."
    keys: ClassVar[tuple[str, ...]] = ("attack", "norm", "eps", "n")
    columns: ClassVar[Mapping[str, str]] = {
        "attack": "{attack}", "ε": "{eps:g}", "images": "{n}", "accuracy (%)": "{percent:.2f}",
    }  # fmt: skip

    eps: Any = None
    steps: int = 20
    images: int | None = None

    def __post_init__(self) -> None:
        if self.eps is not None:
            self.eps = pixel_strengths(self.eps)
        in_range("steps", self.steps, 1, math.inf)
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)

    @override
    def require(self, trained: Trained) -> None:
        if self.eps is None and trained.attack.norm != "linf":
            raise ValueError("the run's attack is in another norm than the maximum norm: name eps")
        if not trained.held_out_images:
            raise ValueError("no images were held out: train with protocol.held_out=0.1")
        if self.images is not None and self.images > trained.held_out_images:
            raise ValueError(f"images={self.images}, but only {trained.held_out_images} were held out")

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        count = self.images or trained.held_out_images
        known = {(row["attack"], as_printed(float(row["eps"]))) for row in there if int(row["n"]) == count}
        cells = [cell for attack in self._attacks(trained) for cell in attack.cells()]
        return any((label, as_printed(eps)) not in known for label, eps in cells)

    @override
    def rows(self, trained: Trained) -> Iterator[dict[str, Any]]:
        images = trained.data.held_out
        assert images is not None, "see `require`"
        for attack in self._attacks(trained):
            for row in evaluate(trained.model, images.take(slice(self.images)), attack):
                percent = 100 * float(row["accuracy"] or 0)
                yield {key: row[key] for key in self.keys} | {"percent": round(percent, 6)}

    def _attacks(self, trained: Trained) -> list[Attack]:
        eps = self.eps if self.eps is not None else [max(trained.attack.eps)]
        return [Fgsm([0.0, *(value for value in eps if value)]), Pgd(eps, steps=self.steps)]
