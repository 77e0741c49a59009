"""Layer cushions: how much of a layer's size acts on the network's own inputs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._layers import first_inputs
from condlr.analysis.base import Analysis, Trained
from condlr.analysis.recovery import layer_maps
from condlr.evaluation import evaluating, first
from condlr.layers import LowRank
from condlr.manifolds.convolution import Convolution


@dataclass
class Cushion(Analysis):
    """mu = min over x of ||W x|| / (||W||_F ||x||) for each layer, x its input (Arora et al., ICML 2018).

    W is the linear map without its bias, of a convolution the operator on images. A layer with a large
    cushion damps noise more than its inputs: on random x the ratio is about one over the square root of the
    number of inputs.

    Attributes:
        images: the first so many test images.
    """

    title: ClassVar[str] = "Layer cushions"
    legend: ClassVar[str] = (
        "‖W x‖ / (‖W‖F ‖x‖) over the inputs x of {images} test images; cushion: the smallest. Noise: the "
        "same of Gaussian x, as a root mean square: one over the square root of the number of inputs."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer", "images")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "cushion": "{cushion}", "median": "{median}", "noise": "{noise}",
        "cushion / noise": "{ratio}",
    }  # fmt: skip
    order: ClassVar[int] = 42

    images: int = 500

    def __post_init__(self) -> None:
        in_range("images", self.images, 1, math.inf)

    @override
    @torch.no_grad()
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        images = first(trained.data.test, min(self.images, trained.test_images))
        model, pixels = trained.model, next(images.batches(len(images)))[0]
        with evaluating(model):
            inputs = first_inputs(model, pixels, (nn.Linear, nn.Conv2d, LowRank))
        for name, operator, x in layer_maps(model, inputs):
            x = x[x.flatten(1).any(dim=1)]  # an input of zeros has no cushion
            seen = operator.apply(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
            found = seen / frobenius(operator) if len(x) else x.new_full((1,), math.nan)
            noise = math.prod(operator.domain) ** -0.5
            yield {
                "layer": name, "images": len(images), "cushion": found.min().item(),
                "median": median(found.tolist()), "noise": noise, "ratio": found.min().item() / noise,
            }  # fmt: skip


def frobenius(operator: Convolution) -> Tensor:
    """||A||_F: each tap counts as often as it meets a pixel of the image."""
    squares = Convolution(
        operator.kernel.square(), operator.size, operator.stride, operator.padding, operator.dilation
    )
    ones = operator.kernel.new_ones(1, *operator.domain)
    return squares.apply(ones).sum().sqrt()
