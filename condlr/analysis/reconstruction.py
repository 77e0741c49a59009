"""Images reconstructed from what the first layers of a network make of them."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._layers import obstacle
from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.recovery import LinearMap, layer_map, least_squares
from condlr.analysis.theory.bounds import in_double
from condlr.analysis.theory.chain import Op, operations
from condlr.convolutions import LowRankConv2d
from condlr.evaluation import first
from condlr.models.base import Standardize


@dataclass
class Reconstruction(Analysis):
    """The first test images, reconstructed from the output of each of the first convolutions, for a figure.

    The way back through the layers: the least-squares input of a convolution (`recovery.least_squares`), and
    the inverse of batch normalisation and of `Standardize`. ReLU cuts values off. They count as unknown: the
    convolution before is solved from the others. What is lost is what the convolutions lose, and what their
    condition numbers keep `iterations` steps from finding.

    Attributes:
        images: the first so many test images.
        layers: how many convolutions deep, at most. A network's way back ends where it is no chain of
            convolutions, normalisations and (leaky) ReLU.
        iterations: of conjugate gradients, for each convolution on the way.
    """

    title: ClassVar[str] = "Reconstruction"
    keys: ClassVar[tuple[str, ...]] = ("layer", "image", "iterations")
    columns: ClassVar[Mapping[str, str]] = {
        "through": "{layer}", "image": "{image}", "relative error": "{error}"
    }  # fmt: skip
    layout: ClassVar[Layout] = "none"
    order: ClassVar[int] = 17
    long: ClassVar[bool] = True

    images: int = 4
    layers: int = 3
    iterations: int = 100

    def __post_init__(self) -> None:
        in_range("images", self.images, 1, math.inf)
        in_range("layers", self.layers, 1, math.inf)
        in_range("iterations", self.iterations, 1, math.inf)

    @override
    def require(self, trained: Trained) -> None:
        if self.images > trained.test_images:
            raise ValueError(f"images={self.images}, but there are only {trained.test_images}")
        if not any(op.kind == "conv" for op in invertible(trained.model)):
            raise ValueError("the network does not begin with a convolution that could be inverted")

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        there = [row for row in there if int(float(row["iterations"])) == self.iterations]
        images = {int(float(row["image"])) for row in there}
        depth = len({row["layer"] for row in there} - {"input"})
        return len(images) < self.images or (
            depth < self.layers and depth < sum(op.kind == "conv" for op in invertible(trained.model))
        )

    @override
    @torch.no_grad()
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        pixels = next(first(trained.data.test, self.images).batches(self.images))[0].double()
        way = invertible(in_double(trained.model))
        places = [place for place, op in enumerate(way) if op.kind == "conv"][: self.layers]
        inputs, z = [], pixels
        for op in way:
            inputs.append(z)
            z = op(z)
        yield from self._rows("input", pixels, pixels)
        for place in places:
            y = way[place](inputs[place])
            found = inverted(way[: place + 1], inputs[: place + 1], y, self.iterations)
            yield from self._rows(way[place].name.removeprefix("network."), found, pixels)

    def _rows(self, layer: str, found: Tensor, pixels: Tensor) -> Iterator[Mapping[str, Any]]:
        sizes = pixels.flatten(1).norm(dim=1)
        errors = torch.where(sizes > 0, (found - pixels).flatten(1).norm(dim=1) / sizes, 0.0)
        shape = "x".join(map(str, pixels.shape[1:]))
        for image, (error, made) in enumerate(zip(errors.tolist(), found, strict=True)):
            levels = (made * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
            yield {
                "layer": layer, "image": image, "iterations": self.iterations, "error": error, "shape": shape,
                "pixels": base64.b64encode(levels.numpy().tobytes()).decode(),
            }  # fmt: skip


def invertible(model: nn.Module) -> list[Op]:
    """The first operations, as far as the way back knows them; none of a network that is not understood."""
    try:
        found = operations(model)
    except ValueError:
        return []
    way = []
    for place, op in enumerate(found):
        if op.takes != (place - 1,) or not _known(op):
            break
        way.append(op)
    return way


def _known(op: Op) -> bool:
    if isinstance(op.module, nn.Conv2d | LowRankConv2d):
        return obstacle(op.module) is None
    inverted = Standardize | nn.BatchNorm2d | nn.ReLU | nn.LeakyReLU | nn.Identity
    return isinstance(op.module, inverted) or op.kind == "dropout"


def inverted(way: Sequence[Op], inputs: Sequence[Tensor], y: Tensor, iterations: int) -> Tensor:
    """The input of a chain of operations from its output y, as `Reconstruction` says.

    Args:
        way: in float64.
        inputs: the true input of each operation; they say where ReLU cut values off.
        y: the output of the last operation.
        iterations: see `Reconstruction`.
    """
    known = torch.ones_like(y)
    for op, x in zip(reversed(way), reversed(inputs), strict=True):
        layer = op.module
        if isinstance(layer, nn.Conv2d | LowRankConv2d):
            if layer.bias is not None:
                y = y - layer.bias[:, None, None]
            y = least_squares(_Known(layer_map(layer, x), known), known * y, iterations)
            known = torch.ones_like(y)
        elif isinstance(layer, nn.LeakyReLU) and layer.negative_slope > 0:
            y = torch.where(y < 0, y / layer.negative_slope, y)
        elif isinstance(layer, nn.ReLU | nn.LeakyReLU):
            known = known * (x > 0)
        elif isinstance(layer, nn.BatchNorm2d):
            scale, shift = _affine(layer)
            y = torch.where(scale == 0, 0, (y - shift) / scale)
            known = known * (scale != 0)
        elif isinstance(layer, Standardize):
            y = y * layer.deviation + layer.mean
    return y


def _affine(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch normalisation in eval mode, x -> scale x + shift for each channel."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -layer.running_mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias
    return scale[:, None, None], shift[:, None, None]


@dataclass(frozen=True)
class _Known:
    """The rows of a linear map whose outputs are known: 1 in `known`, else 0."""

    whole: LinearMap
    known: Tensor

    @property
    def domain(self) -> tuple[int, ...]:
        return self.whole.domain

    def apply(self, x: Tensor) -> Tensor:
        return self.known * self.whole.apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.whole.adjoint(self.known * y)
