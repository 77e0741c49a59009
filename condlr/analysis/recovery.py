"""What a layer keeps of its input: how well the input can be recovered from the output."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._layers import first_inputs, obstacle
from condlr.analysis.base import Analysis, Trained
from condlr.convolutions import LowRankConv2d
from condlr.evaluation import evaluating, first
from condlr.layers import LowRank
from condlr.manifolds.convolution import Convolution, convolution


@dataclass
class Recovery(Analysis):
    r"""The relative error of each layer's input, recovered from the layer's output by the dual frame.

    x^ = (W^T W)^+ W^T (y - b) is the part of x that the layer y = W x + b keeps: x itself where the rows of W
    are a frame, and the projection of x on the row space of W elsewhere. It comes from conjugate gradients
    on W^T W x^ = W^T (y - b) from 0, which take about sqrt(B*/A*) products for each digit; no inverse is
    formed. An ill-conditioned layer therefore has two errors: what it loses, and what the iterations that
    were allowed do not find.

    Attributes:
        images: the first so many test images.
        iterations: of conjugate gradients.
    """

    title: ClassVar[str] = "Recovery"
    caption: ClassVar[str] = "Recovery of each layer's input from its output"
    legend: ClassVar[str] = (
        "Error: mean of ‖x̂ − x‖ / ‖x‖ over the first test images, x̂ the least-squares solution of the layer "
        "after at most so many steps of conjugate gradients. Misfit: mean of ‖W x̂ − W x‖ / ‖W x‖."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer", "images", "iterations")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "images": "{images}", "steps": "{iterations}", "error": "{error}",
        "largest error": "{largest_error}", "misfit": "{misfit}",
    }  # fmt: skip
    order: ClassVar[int] = 16

    images: int = 100
    iterations: int = 100

    def __post_init__(self) -> None:
        in_range("images", self.images, 1, math.inf)
        in_range("iterations", self.iterations, 1, math.inf)

    @override
    def require(self, trained: Trained) -> None:
        if self.images > trained.test_images:
            raise ValueError(f"images={self.images}, but there are only {trained.test_images}")

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        images = first(trained.data.test, self.images)
        model, pixels = trained.model, next(images.batches(self.images))[0]
        with evaluating(model):
            inputs = first_inputs(model, pixels, (nn.Linear, nn.Conv2d, LowRank))
        for name, operator, x in layer_maps(model, inputs):
            y = operator.apply(x)
            found = least_squares(operator, y, self.iterations)
            error = _ratio(_norms(found - x), _norms(x))
            yield {
                "layer": name, "images": self.images, "iterations": self.iterations,
                "error": error.mean().item(), "largest_error": error.max().item(),
                "misfit": _ratio(_norms(operator.apply(found) - y), _norms(y)).mean().item(),
            }  # fmt: skip


class LinearMap(Protocol):
    """A linear map A of tensors (B, *domain), and its adjoint."""

    @property
    def domain(self) -> tuple[int, ...]: ...  # noqa: D102 (see above)
    def apply(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def adjoint(self, y: Tensor) -> Tensor: ...  # noqa: D102


@torch.no_grad()
def least_squares(operator: LinearMap, y: Tensor, iterations: int) -> Tensor:
    """The shortest x with the smallest ||A x - y||, by conjugate gradients on A^T A x = A^T y (CGLS).

    Args:
        operator: A.
        y: (B, out, H', W'), float64; each is solved for itself.
        iterations: stops there, or where all gradients have fallen to 1e-12 of their start.
    """
    r, x = y, y.new_zeros(len(y), *operator.domain)
    s = operator.adjoint(r)
    p, gamma = s, _norms(s).square()
    start = gamma
    for _ in range(iterations):
        if (gamma <= 1e-24 * start).all():
            break
        q = operator.apply(p)
        alpha = _ratio(gamma, _norms(q).square())
        x, r = x + _wide(alpha) * p, r - _wide(alpha) * q
        s = operator.adjoint(r)
        gamma, before = _norms(s).square(), gamma
        p = s + _wide(_ratio(gamma, before)) * p
    return x


def layer_maps(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Convolution, Tensor]]:
    """The name of each layer that `layer_map` can describe, its map, and its input in float64.

    Args:
        inputs: of linear layers and convolutions, see `first_inputs`.
    """
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        convolves = isinstance(layer, nn.Conv2d | LowRankConv2d)
        if not obstacle(layer) if convolves else x.ndim == 2:  # pyright: ignore[reportArgumentType]
            operator = layer_map(layer, x)
            yield name, operator, x.double().view(len(x), *operator.domain)


def layer_map(layer: nn.Module, x: Tensor) -> Convolution:
    """A layer as the linear map of its input; of vectors it is a convolution of a single pixel."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Conv2d | LowRankConv2d):
        size = x.shape[-2], x.shape[-1]
        return convolution(weight, size, layer.stride, layer.padding, layer.dilation)
    return convolution(weight[:, :, None, None], 1, 1, 0, 1)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
