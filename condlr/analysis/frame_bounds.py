"""How far each convolution is from a frame: the extreme eigenvalues of its Gram matrix."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._layers import input_sizes, obstacle
from condlr.analysis.base import Analysis, Trained
from condlr.convolutions import LowRankConv2d
from condlr.manifolds.convolution import DENSE_LIMIT, convolution, frame_bounds, padded_frame_bounds
from condlr.manifolds.gram import smaller_side


@dataclass
class FrameBounds(Analysis):
    """A* and B* of each convolution as an operator on images, see `condlr.manifolds.convolution`.

    They are the extreme eigenvalues of W^T W (side `columns`), or of W W^T where that is smaller (`rows`).
    Without padding the outputs may be so few that the side is another one than for periodic images. A layer
    of rank r < min(out, in) has A* = 0 there: it loses a part of its input whatever its singular values are.

    Attributes:
        restarts: of the iteration for A* of the padded operator.
    """

    title: ClassVar[str] = "Frame bounds"
    caption: ClassVar[str] = "Frame bounds of the convolutions"
    legend: ClassVar[str] = (
        "The smallest and the largest eigenvalue of the smaller Gram matrix of the operator. Circular: of "
        "periodic images, exact. Padded: as the network computes it; B* is an upper bound, A* an estimate, "
        "within the residual of an eigenvalue that need not be the smallest."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer",)
    effort: ClassVar[tuple[str, ...]] = ("restarts",)
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "side": "{side}", "A* circular": "{A_circular}", "B* circular": "{B_circular}",
        "B*/A*": "{ratio}", "A* padded": "{A_padded} ± {residual}", "B* padded": "{B_padded}",
    }  # fmt: skip
    order: ClassVar[int] = 15

    restarts: int = 2

    def __post_init__(self) -> None:
        in_range("restarts", self.restarts, 0, math.inf)

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        sizes = input_sizes(trained.model, trained.data.shape)
        for name, layer in trained.model.named_modules():
            if isinstance(layer, nn.Conv2d | LowRankConv2d) and name in sizes and not obstacle(layer):
                yield {"layer": name} | self._bounds(layer, sizes[name])

    @torch.no_grad()
    def _bounds(self, layer: nn.Conv2d | LowRankConv2d, size: tuple[int, int]) -> dict[str, Any]:
        kernel, (stride, dilation) = layer.weight.detach(), (layer.stride, layer.dilation)
        row: dict[str, Any] = dict.fromkeys(("A_circular", "B_circular", "ratio"))
        periodic = smaller_side(kernel, (stride[0], stride[1]))
        operator = convolution(kernel, size, stride, layer.padding, dilation)
        padded = "columns" if math.prod(operator.range) >= math.prod(operator.domain) else "rows"
        row["restarts"] = self.restarts
        row["side"] = periodic if padded == periodic else f"{periodic}, padded {padded}"
        if not kernel.isfinite().all():
            return row | dict.fromkeys(("A_padded", "residual", "B_padded"), math.nan)
        divides = all(n % s == 0 for n, s in zip(size, stride, strict=True))
        if divides or min(kernel.shape[0], kernel.shape[1]) * math.prod(size) <= DENSE_LIMIT:
            A, B = frame_bounds(kernel, size, stride, dilation)
            # Squares of singular values; products have the rounding of float32, and others are eigenvalues
            least = 1e-30 if divides and isinstance(layer, nn.Conv2d) else 1e-15
            row |= {"A_circular": A, "B_circular": B, "ratio": B / A if least * B < A else math.inf}
        A, residual, B = padded_frame_bounds(kernel, size, stride, layer.padding, dilation, self.restarts)
        return row | {"A_padded": A, "residual": residual, "B_padded": B}
