"""How few directions hold the variance of a network's activations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._activations import activations, chosen
from condlr.analysis.base import Analysis, Layout, Trained
from condlr.evaluation import first


@dataclass
class VarianceRatio(Analysis):
    """The share of the squared singular values of the activations that the r largest have, for a figure.

    VR(r) = sum_{j <= r} s_j^2 / sum_j s_j^2 of the matrix of activations, a row for each test image (arXiv
    1804.07090, figures 1 and 2), as it is and with its mean taken off, which the paper does not say.

    Attributes:
        layers: names of modules, for their outputs, or `name.input`; empty for the input of the last linear
            layer.
        images: the first so many test images.
        largest: r goes up to this.
    """

    title: ClassVar[str] = "Variance ratio"
    keys: ClassVar[tuple[str, ...]] = ("layer", "centred", "images", "index")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "centred": "{centred}", "r": "{index}", "variance ratio": "{ratio}",
    }  # fmt: skip
    layout: ClassVar[Layout] = "none"
    order: ClassVar[int] = 40
    long: ClassVar[bool] = True

    layers: list[str] = field(default_factory=list)
    images: int = 2000
    largest: int = 100

    def __post_init__(self) -> None:
        in_range("images", self.images, 2, math.inf)
        in_range("largest", self.largest, 1, math.inf)

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        if super().lacks(there, trained):
            return True
        count = min(self.images, trained.test_images)
        asked = [
            row for row in there
            if int(float(row["images"])) == count and (not self.layers or row["layer"] in self.layers)
        ]  # fmt: skip
        most = {row["layer"]: row for row in sorted(asked, key=lambda row: int(float(row["index"])))}
        return any(
            int(float(row["index"])) < self.largest and float(row["ratio"]) < 1 - 1e-6
            for row in most.values()
        )

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        names = chosen(trained.model, self.layers, trained.data.shape)
        images = first(trained.data.test, min(self.images, trained.test_images))
        for name, A in activations(trained.model, images, names).items():
            for centred in (False, True):
                ratios = variance_ratio(A - A.double().mean(0) if centred else A)[: self.largest]
                for index, ratio in enumerate(ratios.tolist(), start=1):
                    yield {
                        "layer": name, "centred": centred, "images": len(images), "index": index,
                        "ratio": f"{ratio:.7g}",
                    }  # fmt: skip


def variance_ratio(A: Tensor) -> Tensor:
    """VR(1), VR(2), ... of the rows of A (n, m), in float64; min(n, m) values, the last of which is 1."""
    values = gram_spectrum(A)
    return values.cumsum(0) / values.sum()


def gram_spectrum(A: Tensor) -> Tensor:
    """The squared singular values of A (n, m), largest first, from its smaller Gram matrix in float64."""
    A = A.double()
    gram = A @ A.mT if len(A) <= A.shape[1] else A.mT @ A
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
