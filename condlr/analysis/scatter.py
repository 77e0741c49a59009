"""The activations of test images in their first two principal components, for a figure."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._activations import activations, chosen
from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.embeddings import components
from condlr.evaluation import first


@dataclass
class Scatter(Analysis):
    """A point for each test image (arXiv 1804.07090, figure 6), in units of the first standard deviation.

    Attributes:
        layers: names of modules, for their outputs, or `name.input`; empty for the input of the last linear
            layer.
        images: the first so many test images, whose principal components these are.
    """

    title: ClassVar[str] = "Embeddings in the plane"
    keys: ClassVar[tuple[str, ...]] = ("layer", "images", "image")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "image": "{image}", "class": "{class_}", "first": "{first}", "second": "{second}",
    }  # fmt: skip
    layout: ClassVar[Layout] = "none"
    order: ClassVar[int] = 45
    long: ClassVar[bool] = True

    layers: list[str] = field(default_factory=list)
    images: int = 1000

    def __post_init__(self) -> None:
        in_range("images", self.images, 2, math.inf)

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        names = chosen(trained.model, self.layers, trained.data.shape)
        images = first(trained.data.test, min(self.images, trained.test_images))
        for name, A in activations(trained.model, images, names).items():
            points, _ = components(A.double(), A[:1].double(), [min(2, A.shape[1])])
            for image, (point, label) in enumerate(zip(points.tolist(), images.labels.tolist(), strict=True)):
                yield {
                    "layer": name, "images": len(images), "image": image, "class_": label,
                    "first": f"{point[0]:.5g}", "second": f"{point[-1] if len(point) > 1 else 0:.5g}",
                }  # fmt: skip
