"""Projected SGD on the Stiefel manifold (Absil and Malick, SIAM J. Optim. 2012)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.manifolds import cayley, stiefel
from condlr.methods._stiefel_descent import StiefelDescent


@dataclass
class ProjectedSgd(StiefelDescent):
    """Riemannian gradient of the embedded metric, then a retraction: dense weights, cond(W) = 1.

    X <- qf(X - step xi) with xi = G - X sym(X^T G) and, with momentum, the tangent part of mu b + G.

    Attributes:
        retraction: `qr` with positive diagonal, or `polar`, the nearest orthonormal matrix.
    """

    title: ClassVar[str] = "Projected SGD"
    order: ClassVar[int] = 2
    colours: ClassVar[Mapping[str, str]] = {"projected_sgd": "#882255"}

    cap: str = "none"
    retraction: str = "qr"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("retraction", self.retraction, stiefel.RETRACTIONS)

    @override
    def curve(self, W: cayley.Skew, step: Tensor | float) -> Tensor:
        return stiefel.retract([W.X - step * W.tangent], self.retraction)[0]
